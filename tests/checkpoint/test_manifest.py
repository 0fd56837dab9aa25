"""No byte of a manifest can change unseen, and no row of a tensor be lost or doubled."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from ptm.checkpoint import manifest as m
from ptm.checkpoint.safetensors_file import SafetensorsFile
from ptm.common.errors import CheckpointError

ZEROS = "0" * 32


def shard(first: int, rows: int, header_bytes: int = 80) -> m.ShardFile:
    size = header_bytes + rows * 3 * 4
    return m.ShardFile(
        size, header_bytes, ZEROS, {"model.w": m.Piece(first, rows, header_bytes, ZEROS)}
    )


def sample() -> m.Manifest:
    return m.Manifest(
        step=120,
        run_id="r1",
        world=2,
        holds=m.TRAINING,
        census={"model.w": m.Entry((5, 3), "F32")},
        files={"a.safetensors": shard(0, 3), "b.safetensors": shard(3, 2)},
        attachments={"tokenizer/tokenizer.json": m.Attachment(7, ZEROS)},
        meta={"loss": 0.1, "words": ["ü", None, 1e-300]},
        is_best=True,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    m.write(tmp_path, sample())
    found = m.read(tmp_path)
    assert found == sample()
    assert [(file, piece.first_row) for file, piece in found.pieces("model.w")] == [
        ("a.safetensors", 0),
        ("b.safetensors", 3),
    ]
    with pytest.raises(FileExistsError):
        m.write(tmp_path, sample())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    m.write(tmp_path, sample())
    path, sound = tmp_path / m.FILE, (tmp_path / m.FILE).read_bytes()
    rng = random.Random(5)
    for bit in rng.sample(range(8 * len(sound)), 400):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            m.read(tmp_path)
    path.write_bytes(sound)
    m.read(tmp_path)


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text + b"\n",
        lambda text: text.replace(b'"step":120', b'"step": 120'),
        lambda text: text.replace(b'"step":120', b'"step":120,"step":120'),
    ],
    ids=["newline", "space", "twice"],
)
def test_same_values_in_other_bytes_are_refused(tmp_path: Path, respell) -> None:
    m.write(tmp_path, sample())
    path = tmp_path / m.FILE
    assert respell(path.read_bytes()) != path.read_bytes()
    path.write_bytes(respell(path.read_bytes()))
    with pytest.raises(CheckpointError, match="manifest.json: is damaged|twice"):
        m.read(tmp_path)


def reseal(folder: Path, change) -> None:
    """Change a manifest and give it a fitting hash, as a newer version or an attacker would."""
    values = json.loads((folder / m.FILE).read_bytes())
    del values["xxh3_128"]
    change(values)
    values["xxh3_128"] = xxhash.xxh3_128_hexdigest(text_of(values))
    (folder / m.FILE).write_bytes(text_of(values))


def text_of(values: dict) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_a_newer_format_says_what_it_needs(tmp_path: Path) -> None:
    m.write(tmp_path, sample())
    reseal(tmp_path, lambda v: v.update(format_version=2, needs_ptm="9.1", shape="unheard of"))
    with pytest.raises(m.NewerFormat, match=r"format_version=2: .* up to 1; use ptm 9\.1"):
        m.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(step=-1),
        lambda v: v.update(step=True),
        lambda v: v.update(world="2"),
        lambda v: v.update(format_version=0),
        lambda v: v.update(extra=1),
        lambda v: v.pop("meta"),
        lambda v: v.update(census={}),
        lambda v: v.update(holds="secrets"),
        lambda v: v["census"]["model.w"].update(shape=[5, -3]),
        lambda v: v["census"]["model.w"].update(shape=[5, 3.0]),
        lambda v: v["census"]["model.w"].update(dtype="F33"),
        lambda v: v["census"].update({"../../etc/passwd": {"shape": [1], "dtype": "F32"}}),
        lambda v: v["files"].update({"../x.safetensors": v["files"].pop("a.safetensors")}),
        lambda v: v["files"].update({"run.py": v["files"].pop("a.safetensors")}),
        lambda v: v["attachments"].update({"a/b/c": {"size_bytes": 1, "xxh3_128": ZEROS}}),
        lambda v: v["attachments"].update({"../c": {"size_bytes": 1, "xxh3_128": ZEROS}}),
        lambda v: v["attachments"].update({"x.safetensors": {"size_bytes": 1, "xxh3_128": ZEROS}}),
        lambda v: v["files"]["a.safetensors"]["pieces"]["model.w"].update(xxh3_128="no"),
        lambda v: v["files"]["a.safetensors"]["pieces"]["model.w"].update(start=10**30),
        lambda v: v["files"]["a.safetensors"].update(size_bytes=1),
    ],
)
def test_resealed_nonsense_is_refused(tmp_path: Path, change) -> None:
    m.write(tmp_path, sample())
    reseal(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        m.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_resealing_alone_is_accepted(tmp_path: Path) -> None:
    m.write(tmp_path, sample())
    reseal(tmp_path, lambda v: v.update(step=7))
    assert m.read(tmp_path).step == 7


@pytest.mark.parametrize(
    "files, match",
    [
        ({"a.safetensors": shard(0, 3)}, r"model.w: has rows up to 3 of 5"),
        ({"b.safetensors": shard(3, 2)}, r"model.w: has row 0 nowhere"),
        ({"a.safetensors": shard(0, 3), "b.safetensors": shard(2, 3)}, r"row 2 twice"),
        ({"a.safetensors": shard(0, 2), "b.safetensors": shard(3, 2)}, r"row 2 nowhere"),
        ({"a.safetensors": shard(0, 6)}, r"rows up to 6 of 5"),
        ({}, r"rows up to 0 of 5"),
    ],
)
def test_each_row_is_there_once(files: dict[str, m.ShardFile], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        replace(sample(), files=files)


def test_weights_only_holds_no_optimizer() -> None:
    replace(sample(), holds=m.WEIGHTS)
    census = {"model.w": m.Entry((5, 3), "F32"), "optim.exp_avg.w": m.Entry((1,), "F32")}
    with pytest.raises(CheckpointError, match="optim.exp_avg.w: is no weight"):
        replace(sample(), holds=m.WEIGHTS, census=census)


def test_describe_a_file(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    save_file({"model.w": tensor}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    digest = xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
    found = m.describe(SafetensorsFile(tmp_path, "a.safetensors"), {"model.w": (3, digest)})
    header = raw[: -tensor.nbytes]
    assert found == m.ShardFile(
        len(raw),
        len(header),
        xxhash.xxh3_128_hexdigest(header),
        {"model.w": m.Piece(3, 2, len(header), digest)},
    )
    with pytest.raises(CheckpointError, match="model.v"):
        m.describe(SafetensorsFile(tmp_path, "a.safetensors"), {"model.v": (3, digest)})

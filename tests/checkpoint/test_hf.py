"""Published folders: read as published, rebuilt as they were, refused when anything is odd."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptm.checkpoint.hf import INDEX, open_hf, write_hf
from ptm.checkpoint.safetensors_file import as_bytes
from ptm.checkpoint.shards import new_folder
from ptm.common.errors import CheckpointError, StorageError
from ptm.model.config import RopeMode
from ptm.model.hf_names import HEAD, Layout

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden folder, and only of what is a model."""
    made = tmp_path / "published"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, made / name)
    return made


def rebuild(source: Path, out: Path, layout: Layout = Layout.hf, **how: Any) -> Path:
    how = {"dtype": None, "shard_bytes": 10**9, "ids": {}} | how
    with new_folder(out) as made:
        write_hf(made, open_hf(source), layout=layout, **how)
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    keys = json.loads((folder / "config.json").read_text())
    change(keys)
    (folder / "config.json").write_text(json.dumps(keys))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape and tensor.dtype == b[name].dtype, name
        assert as_bytes(tensor) == as_bytes(b[name]), name


def test_opens_the_golden_folder_under_our_names() -> None:
    opened = open_hf(GOLDEN)  # other safetensors files lie beside it
    golden = load_file(GOLDEN / "model.safetensors")
    assert opened.notes == ()
    assert opened.model.rope_mode is RopeMode.megatron and opened.model.num_experts == 8
    weights = opened.weights
    assert HEAD not in weights.names() and len(weights.names()) == 2 + 3 * 16
    w1 = weights.read("model.layers.2.mlp.experts.w1")
    assert w1.shape == (8, 512, 64)
    for e in range(8):
        assert torch.equal(w1[e], golden[f"model.layers.2.mlp.experts.{e}.w1.weight"])
    rows = weights.read("model.layers.2.mlp.experts.w1", 3, 5)
    assert torch.equal(rows, w1[3:5])
    assert torch.equal(weights.read(EMBEDDING, 7, 9), golden[EMBEDDING][7:9])


@pytest.mark.parametrize("shard_bytes", [10**9, 10**6, 1])
@pytest.mark.parametrize("through", list(Layout))
def test_rebuilds_the_golden_folder(tmp_path: Path, through: Layout, shard_bytes: int) -> None:
    there = rebuild(GOLDEN, tmp_path / "there", through, shard_bytes=shard_bytes)
    back = rebuild(there, tmp_path / "back")
    assert_same(tensors_of(back), load_file(GOLDEN / "model.safetensors"))
    keys = json.loads((back / "config.json").read_text())
    assert keys == json.loads((GOLDEN / "config.json").read_text())
    assert (there / INDEX).exists() == (shard_bytes < 10**9)


def test_index_and_shards_are_what_other_readers_expect(tmp_path: Path) -> None:
    made = rebuild(GOLDEN, tmp_path / "made", shard_bytes=10**6)
    index = json.loads((made / INDEX).read_text())
    golden = load_file(GOLDEN / "model.safetensors")
    for file in set(index["weight_map"].values()):
        tensors = load_file(made / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == tensors.keys()
        assert sum(t.numel() * 4 for t in tensors.values()) <= 10**6
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in golden.values())


def test_untied(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, lambda keys: keys.update(tie_word_embeddings=False))
    edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD] + 1}))
    assert HEAD in open_hf(folder).weights.names()
    assert_same(tensors_of(rebuild(folder, tmp_path / "out")), tensors_of(folder))


def test_tied_without_the_copy_is_rebuilt_without(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(HEAD))
    assert_same(tensors_of(rebuild(folder, tmp_path / "out")), tensors_of(folder))


def test_a_tied_copy_that_differs_is_refused(folder: Path) -> None:
    # -0.0 == 0.0, and bits are what is promised.
    edit_weights(folder, lambda t: (t[EMBEDDING][0, 0].fill_(0.0), t[HEAD][0, 0].fill_(-0.0)))
    with pytest.raises(CheckpointError, match=f"tensor={HEAD}: must equal"):
        open_hf(folder)


def test_every_bit_pattern_survives(folder: Path, tmp_path: Path) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = patterns.repeat(tensor.numel() // 2**16 + 1)[: tensor.numel()]
            tensors[name] = tensors[name].reshape(tensor.shape).clone()

    edit_weights(folder, fill)
    there = rebuild(folder, tmp_path / "there", Layout.hf2)
    assert_same(tensors_of(rebuild(there, tmp_path / "back")), tensors_of(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = rebuild(GOLDEN, tmp_path / "made", dtype=dtype)
    golden = load_file(GOLDEN / "model.safetensors")
    assert_same(tensors_of(made), {name: tensor.to(dtype) for name, tensor in golden.items()})
    keys = json.loads((made / "config.json").read_text())
    assert keys["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_number_that_fp16_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(70_000.0))
    with pytest.raises(CheckpointError, match="cannot hold model.norm.weight"):
        rebuild(folder, tmp_path / "out", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_tokenizer_files_are_copied_and_code_is_not(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"\x00pieces")
    (folder / "modeling.py").write_text("raise SystemExit")
    made = rebuild(folder, tmp_path / "out")
    assert (made / "tokenizer.model").read_bytes() == b"\x00pieces"
    found = {path.name for path in made.iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer.model"}


def test_cached_rotary_tables_are_ignored_with_a_note(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert open_hf(folder).notes == (
        "rotary_emb.inv_freq ignored: computed from the configuration",
    )


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        rebuild(GOLDEN, folder)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="free=1,000 B: must be 5.2. MiB"):
        rebuild(GOLDEN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def cut(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1])


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def shard(folder: Path) -> list[Path]:
    rebuild(folder, folder / "tmp", shard_bytes=2 * 10**6)
    (folder / "model.safetensors").unlink()
    for path in (folder / "tmp").iterdir():
        path.replace(folder / path.name)
    return sorted(folder.glob("model-*.safetensors"))


def swap(folder: Path) -> None:
    a, b, *_ = shard(folder)
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard(folder)
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut, "model.safetensors=.* bytes"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "too short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json=.*: is missing"),
    "pickles only": (pickles_only, r"pickled weights only \(pytorch_model.bin\).*safetensors"),
    "link out": (link_out, "is a link out of its folder"),
    "tensor missing": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.mlp.experts.3.w2.weight")),
        "tensor=model.layers.1.mlp.experts.3.w2.weight: is missing",
    ),
    "tensor unknown": (
        lambda f: edit_weights(f, lambda t: t.update(extra=torch.ones(3))),
        "tensor=extra: is unknown",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        r"tensor=model.norm.weight: has shape \(63,\) .* needs \(64,\)",
    ),
    "transposed": (
        lambda f: edit_weights(
            f,
            lambda t: t.update(
                {(n := "model.layers.0.self_attn.o_proj.weight"): t[n].T.contiguous()}
            ),
        ),
        "o_proj.weight: has shape",
    ),
    "dtypes mixed in an expert stack": (
        lambda f: edit_weights(
            f, lambda t: t.update({(n := "model.layers.0.mlp.experts.1.w1.weight"): t[n].half()})
        ),
        "model.layers.0.mlp.experts.w1: has parts of several dtypes",
    ),
    "another model's config": (
        lambda f: edit_config(f, lambda keys: keys.update(num_hidden_layers=2)),
        "layers.2.* is unknown",
    ),
    "two shards swapped": (swap, "is in model-0000. and not in|is in model-.* and not in"),
    "shard missing": (lambda f: shard(f)[1].unlink(), "model-00002-of-.*=.*: is missing"),
    "both kinds": (
        lambda f: (shard(f), (f / "model.safetensors").write_bytes(b"")),
        "has both",
    ),
    "index names a path": (
        edit_index(lambda i: i["weight_map"].update({HEAD: "../model.safetensors"})),
        "must be a plain name",
    ),
    "index of numbers": (edit_index(lambda i: i["weight_map"].update({HEAD: 3})), "must map"),
    "index is a list": (edit_index(lambda i: i.update(weight_map=[])), "must map"),
    "index lacks a tensor": (
        edit_index(lambda i: i["weight_map"].pop(HEAD)),
        f"tensor={HEAD}: is not in model.safetensors.index.json",
    ),
    "index has a tensor more": (
        edit_index(lambda i: i["weight_map"].update(more=i["weight_map"][HEAD])),
        "tensor=more: is not in its file",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_refuses(folder: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    open_hf(folder)  # the control: it is good before
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_hf(folder)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_mutated_files_are_refused_or_read_but_never_crash(folder: Path, name: str) -> None:
    # The header only: a published folder has no hashes, so a changed weight is another weight.
    if name == INDEX:
        shard(folder)
    whole = (folder / name).read_bytes()
    size = len(whole) if name != "model.safetensors" else 8 + int.from_bytes(whole[:8], "little")
    tokens = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"-",
        b"1e9",
        b"null",
        b"true",
        b"9" * 30,
        b"\x00",
        b"\xff",
        b"",
    ]
    outcomes = set()
    for seed in range(300):
        draw = random.Random(seed)
        start = draw.randrange(size)
        stop = min(size, start + draw.choice((0, 1, 1, 1, 8)))
        bad = whole[:start] + draw.choice(tokens) + whole[stop:]
        (folder / name).write_bytes(bad)
        try:
            open_hf(folder)
            outcomes.add("read")
        except CheckpointError as error:
            assert str(error).isprintable(), seed
            outcomes.add("refused")
    assert "refused" in outcomes

"""A load is bit for bit what was saved, on any number of ranks, or it names what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.load import load, newest_good
from ptm.checkpoint.manifest import Manifest, NewerFormat, describe, entry_of
from ptm.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter, as_bytes
from ptm.checkpoint.save import Saver
from ptm.checkpoint.verify import verify
from ptm.common.errors import CheckpointError
from ptm.mesh.peers import Peers
from tests.support.ranks import run_ranks
from tests.support.state import assert_bitwise_equal, empty, sharded, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
W1 = "model.model.layers.0.mlp.experts.w1"


def save(
    root: Path, step: int, *, run_id: str = "run-1", keep: int = 9, seed: int | None = None
) -> Path:
    """A checkpoint of world 1 with a tokenizer and another attachment."""
    source = root.parent / "attached"
    source.mkdir(exist_ok=True)
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": list(range(40))}}))
    saving = Saver(root, CheckpointConfig(keep=keep), run_id=run_id)
    attachments = {"tokenizer": source, "recipe.yaml": source / "tokenizer.json"}
    state = whole(step if seed is None else seed)
    saved = saving.save(state, step=step, meta={"step": step}, attachments=attachments, block=True)
    saving.close()
    assert saved is not None
    return saved.folder


# ------------------------------------------------------------------------------------ any world


def save_job(rank: int, world: int, root: str) -> None:
    saving = Saver(
        Path(root), CheckpointConfig(), run_id="r", peers=Peers(dist.new_group(backend="gloo"))
    )
    saving.save(sharded(whole(5)), step=world, meta={"saved_on": world}, block=True)
    saving.close()


def load_job(rank: int, world: int, root: str) -> list[int]:
    peers = Peers(dist.new_group(backend="gloo"))
    saved_on = []
    for folder in sorted(Path(root).glob("step-*")):
        into = sharded(empty(whole(5)))
        meta = load(verify(folder, peers), into, peers=peers)
        assert_bitwise_equal(into, sharded(whole(5)))
        saved_on.append(meta["saved_on"])
    return saved_on


def test_saved_on_any_world_loads_on_any_other(tmp_path: Path) -> None:
    worlds = [1, 2, 3, 4]
    for world in worlds:
        run_ranks(world, save_job, str(tmp_path / f"w{world}"))
        shutil.move(tmp_path / f"w{world}" / f"step-{world:08d}", tmp_path)
    for world in worlds:
        assert run_ranks(world, load_job, str(tmp_path)) == [worlds] * world


# ------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.pop(W1), rf"{W1}: is in the checkpoint only"),
        (lambda s: s.update({"model.new": torch.zeros(2)}), r"model\.new: is in the model only"),
        (lambda s: s.update({W1: s[W1].bfloat16()}), rf"{W1}: is F32 .* the model has BF16"),
        (lambda s: s.update({W1: s[W1][:4]}), rf"{W1}: is F32 \[5, 4, 6\], .* \[4, 4, 6\]"),
        (lambda s: s.update({W1: s[W1].transpose(1, 2)}), rf"{W1}: is F32 \[5, 4, 6\]"),
    ],
    ids=["missing", "extra", "dtype", "fewer-rows", "transposed"],
)
def test_another_model_is_refused_before_a_tensor_changes(tmp_path: Path, change, match) -> None:
    good = verify(save(tmp_path / "c", 1))
    into = empty(whole(1))
    change(into)
    with pytest.raises(CheckpointError, match=match):
        load(good, into)
    assert all(tensor[0].isnan().all() for name, tensor in into.items() if name != "model.new")


def convert(folder: Path, dtype: torch.dtype) -> Path:
    """A folder of weights only, as a conversion of a published model makes it."""
    folder.mkdir()
    weights = {n: t.to(dtype) for n, t in whole(7).items() if n.startswith("model.")}
    parts = {n: (tuple(t.shape), dtype) for n, t in weights.items()}
    with SafetensorsWriter(folder / "model.safetensors", parts) as file:
        for name in file.names:
            file.write(name, weights[name])
    hashes = {n: (0, xxhash.xxh3_128_hexdigest(as_bytes(t))) for n, t in weights.items()}
    described = describe(SafetensorsFile(folder, "model.safetensors"), hashes)
    manifest = Manifest(
        step=0,
        run_id="converted",
        world=1,
        holds=manifests.WEIGHTS,
        census={n: entry_of(t.shape, dtype) for n, t in weights.items()},
        files={"model.safetensors": described},
    )
    manifests.write(folder, manifest)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_only_loads_when_asked(tmp_path: Path, dtype: torch.dtype) -> None:
    good = verify(convert(tmp_path / "m", dtype))
    into = empty(whole(7))
    with pytest.raises(CheckpointError, match=r"no optimizer states; .* train\.init_from"):
        load(good, into)
    load(good, into, weights_only=True)
    for name, tensor in whole(7).items():
        if name.startswith("model."):
            assert torch.equal(into[name], tensor.to(dtype).float()), name
        else:
            assert into[name].isnan().all(), name


def test_weights_of_a_training_checkpoint_load_alone(tmp_path: Path) -> None:
    good = verify(save(tmp_path / "c", 3))
    into = {name: tensor for name, tensor in empty(whole(3)).items() if name.startswith("model.")}
    load(good, into, weights_only=True)
    assert_bitwise_equal(into, {name: whole(3)[name] for name in into})


# ------------------------------------------------------------------------- damage (T18 and T19)


def test_every_one_of_200_flipped_bits_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", 1)
    sound = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = verify(folder).manifest
    rng = random.Random(18)
    shards = [path for path in sound if path.suffix == ".safetensors"]
    other = [path for path in sound if path.suffix != ".safetensors"]
    places: list[tuple[Path, int, str]] = []
    for _ in range(100):
        path = rng.choice(shards)
        entry = manifest.files[path.name]
        tensor, piece = rng.choice(sorted(entry.pieces.items()))
        length = piece.num_rows * manifest.census[tensor].row_bytes
        places.append((path, piece.start + rng.randrange(length), tensor))
    for _ in range(50):
        path = rng.choice(shards)
        places.append((path, rng.randrange(manifest.files[path.name].header_bytes), path.name))
    for i in range(50):
        path = other[i % len(other)]
        places.append((path, rng.randrange(len(sound[path])), path.name))
    found = 0
    for path, position, named in places:
        damaged = bytearray(sound[path])
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            verify(folder)
        assert named in str(caught.value) and "\n" not in str(caught.value)
        path.write_bytes(sound[path])
        found += 1
    assert found == 200 and verify(folder).manifest == manifest


def flip_job(rank: int, world: int, folder: str) -> list[str]:
    """Damage that only one rank's share has is refused by all, with the same words."""
    peers = Peers(dist.new_group(backend="gloo"))
    shards = sorted(Path(folder).glob("*.safetensors"))
    messages = []
    for path in shards:
        sound = path.read_bytes()
        dist.barrier()
        if rank == 0:
            path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        dist.barrier()
        with pytest.raises(CheckpointError) as caught:
            verify(Path(folder), peers)
        messages.append(str(caught.value).removesuffix(f" (rank {1 - rank})"))
        dist.barrier()
        if rank == 0:
            path.write_bytes(sound)
    dist.barrier()
    verify(Path(folder), peers)
    return messages


def test_all_ranks_refuse_what_one_has_found(tmp_path: Path) -> None:
    first, second = run_ranks(2, flip_job, str(save(tmp_path / "c", 1)))
    assert first == second and len(first) == 2


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def swap(folder: Path, other: Path) -> None:
    a, b = shards_of(folder)[:2]
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)


def link_out(folder: Path, other: Path) -> None:
    path = shards_of(folder)[0]
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")


def link_in(folder: Path, other: Path) -> None:
    path = shards_of(folder)[0]
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def pipe(folder: Path, other: Path) -> None:
    path = shards_of(folder)[0]
    path.unlink()
    os.mkfifo(path)


FIRST = r"shard-00001-model-00001-of-00002\.safetensors"
WRONG: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "truncated": (lambda f, o: os.truncate(shards_of(f)[0], 900), FIRST),
    "longer": (lambda f, o: shards_of(f)[0].open("ab").write(b"x"), FIRST),
    "empty": (lambda f, o: shards_of(f)[0].write_bytes(b""), FIRST),
    "missing": (lambda f, o: shards_of(f)[0].unlink(), FIRST + ": is missing"),
    "no-manifest": (lambda f, o: (f / "manifest.json").unlink(), r"manifest\.json.*: is missing"),
    "no-tokenizer": (lambda f, o: shutil.rmtree(f / "tokenizer"), r"tokenizer\.json: is missing"),
    "extra": (lambda f, o: (f / "x.safetensors").touch(), r"=x\.safetensors: is not in the"),
    "extra-deep": (lambda f, o: (f / "tokenizer/x.py").touch(), r"=tokenizer/x\.py: is not in"),
    "extra-folder": (lambda f, o: (f / "more").mkdir(), r"=more: is a link or no file"),
    "swapped": (swap, FIRST),
    "other-run": (lambda f, o: shutil.copy(shards_of(o)[0], shards_of(f)[0]), FIRST),
    "stale-manifest": (lambda f, o: shutil.copy(o / "manifest.json", f), r"shard-0.*=.*damaged"),
    "link-out": (link_out, FIRST + ": is a link"),
    "link-in": (link_in, FIRST + ": is a link"),
    "pipe": (pipe, FIRST + ": is a link or no file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    folder, other = save(tmp_path / "c", 1), save(tmp_path / "other", 1, run_id="run-2", seed=8)
    verify(folder)
    spoil, match = WRONG[kind]
    spoil(folder, other)
    with pytest.raises(CheckpointError, match=match):
        verify(folder)


CANARY = "cos\nsystem\n(S'touch {path}'\ntR."  # a pickle that runs a command when it is read


def test_nothing_in_a_checkpoint_is_ever_executed(tmp_path: Path) -> None:
    folder, canary = save(tmp_path / "c", 1), tmp_path / "canary"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        sound = path.read_bytes()
        path.write_bytes(CANARY.format(path=canary).encode())
        with pytest.raises(CheckpointError):
            verify(folder)
        path.write_bytes(sound)
    verify(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a":' * 50_000,
        b"[" * 10**6,
        b"\xff" * 99,
        b'{"a":NaN}',
        b"1e999",
    ],
    ids=["empty", "cut", "list", "null", "deep", "wide", "no-text", "nan", "huge"],
)
def test_a_hostile_manifest_is_one_line(tmp_path: Path, text: bytes) -> None:
    folder = save(tmp_path / "c", 1)
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="manifest.json") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_header_offsets_that_torch_would_believe_are_compared(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", 1)
    path = shards_of(folder)[0]
    raw = path.read_bytes()
    moved = raw.replace(b'\\"saved_offsets\\": [0, 0, 0]', b'\\"saved_offsets\\": [1, 0, 0]', 1)
    assert moved != raw
    path.write_bytes(moved)
    manifest = manifests.read(folder)
    entry = manifest.files[path.name]
    digest = xxhash.xxh3_128_hexdigest(moved[: entry.header_bytes])
    manifest.files[path.name] = entry._replace(header_xxh3_128=digest)
    (folder / "manifest.json").write_bytes(manifest.dump())
    with pytest.raises(CheckpointError, match="DCP_SHARDING_INFO: gives its tensors other rows"):
        verify(folder)


# --------------------------------------------------------------------------------- newest good


def flip_last(folder: Path) -> None:
    path = shards_of(folder)[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "none", repair=True) is None
    (tmp_path / "step-1000").mkdir()
    (tmp_path / "notes.txt").write_text("hi")
    assert newest_good(tmp_path, repair=True) is None


@pytest.mark.parametrize("repair", [True, False])
def test_the_newest_good_one_is_found_and_the_others_named(tmp_path: Path, repair: bool) -> None:
    root = tmp_path / "c"
    folders = [save(root, step) for step in (1, 2, 3)]
    flip_last(folders[2])
    good = newest_good(root, repair=repair)
    assert good is not None and good.folder == folders[1] and good.manifest.step == 2
    ((folder, reason),) = good.rejected
    assert folder == folders[2] and "its bytes are damaged" in reason
    names = sorted(os.listdir(root))
    assert names[:2] == [f.name for f in folders[:2]]
    assert names[2].startswith("step-00000003.bad-" if repair else "step-00000003")
    if repair:
        again = newest_good(root, repair=True)
        assert again is not None and again.folder == folders[1] and again.rejected == ()


def test_if_none_is_good_that_is_an_error_each_time(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (1, 2):
        flip_last(save(root, step))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match="none is good: .*step-00000002.*step-00000001"
        ) as e:
            newest_good(root, repair=True)
        assert e.value.exit_code == 4
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]


def test_a_newer_format_is_not_stepped_over(tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "c"
    save(root, 1)
    monkeypatch.setattr(manifests, "VERSION", 2)
    monkeypatch.setattr(manifests, "NEEDS_PTM", "0.9")
    save(root, 2)
    monkeypatch.undo()
    with pytest.raises(NewerFormat, match=r"use ptm 0\.9 or newer") as caught:
        newest_good(root, repair=True)
    assert caught.value.exit_code == 4 and len(os.listdir(root)) == 2


def test_other_runs_and_renamed_folders_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "c"
    save(root, 1)
    save(root, 5, run_id="run-2")
    shutil.copytree(root / "step-00000001", root / "step-00000007")
    good = newest_good(root, run_id="run-1", repair=True)
    assert good is not None and good.manifest.step == 1
    assert [folder.name for folder, _ in good.rejected] == ["step-00000007", "step-00000005"]
    assert "holds step 1" in good.rejected[0][1] and "is not run run-1" in good.rejected[1][1]
    names = [f"step-0000000{step}" for step in (1, 5, 7)]
    assert sorted(os.listdir(root)) == names, "neither is damaged, so both keep their names"


def test_a_folder_that_may_not_be_ours_keeps_its_name(tmp_path: Path) -> None:
    root = tmp_path / "c"
    folder = save(root, 1)
    (root / "step-00000009").mkdir()
    (root / "step-00000009" / "model.bin").write_bytes(b"somebody's")
    good = newest_good(root, repair=True)
    assert good is not None and good.folder == folder
    assert [folder.name for folder, _ in good.rejected] == ["step-00000009"]
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000009"]


HEX = "0123456789abcdef" * 2


def test_repair_finishes_what_a_kill_left_and_touches_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "c"
    folders = [save(root, step) for step in (1, 2)]
    shutil.copytree(folders[0], root / f"step-00000003.tmp-{HEX}")
    shutil.copytree(folders[0], root / f"step-00000001.trash-{HEX}")
    shutil.copytree(folders[1], root / f"step-00000002.old-{HEX}")
    foreign = ["step-00000003.tmp-mine", f"step-3.tmp-{HEX}", f"x.trash-{HEX}", "step-00000004.bak"]
    for name in foreign:
        shutil.copytree(folders[0], root / name)
    (root / f"step-00000009.tmp-{HEX}").symlink_to(tmp_path)
    before = sorted(os.listdir(root))
    assert newest_good(root) is not None
    assert sorted(os.listdir(root)) == before, "only repair may change anything"
    assert newest_good(root, repair=True) is not None
    wanted = [f.name for f in folders] + foreign + [f"step-00000009.tmp-{HEX}"]
    assert sorted(os.listdir(root)) == sorted(wanted)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    root = tmp_path / "c"
    folder = save(root, 2)
    folder.rename(root / f"step-00000002.old-{HEX}")
    good = newest_good(root, repair=True)
    assert good is not None and good.folder == folder

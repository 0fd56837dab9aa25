"""A save is whole or absent, exact to the step it was asked at, and complete to the tensor."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ptm.checkpoint import manifest as manifests
from ptm.checkpoint.commit import preflight
from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.dcp_writer import FILE_BYTES, plan_files
from ptm.checkpoint.load import load
from ptm.checkpoint.manifest import Entry
from ptm.checkpoint.save import Saved, Saver
from ptm.checkpoint.verify import verify
from ptm.common.errors import CheckpointError, StorageError
from ptm.mesh.peers import Peers
from tests.support import faulty_disk
from tests.support.ranks import run_ranks
from tests.support.state import NAMES, assert_bitwise_equal, empty, sharded, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saver(root: Path, **options: Any) -> Saver:
    config = CheckpointConfig(background=options.pop("background", True))
    return Saver(root, config, run_id=options.pop("run_id", "run-1"), **options)


def read(folder: Path) -> dict[str, torch.Tensor]:
    into = empty(whole(0))
    load(verify(folder), into)
    return into


def test_what_lies_in_a_checkpoint(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "special.txt").write_text("<eod>")
    saving = saver(tmp_path / "checkpoints")
    saved = saving.save(
        whole(1),
        step=120,
        meta={"tokens": 7, "model": {"hidden_size": 6}},
        attachments={"tokenizer": tokenizer, "recipe.yaml": tokenizer / "special.txt"},
        expected=NAMES,
        is_best=True,
        block=True,
    )
    saving.close()
    assert saved is not None and saved.is_new and saved.notes == []
    folder = tmp_path / "checkpoints" / "step-00000120"
    assert saved.folder == folder and os.listdir(folder.parent) == [folder.name]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    shards = {name for name in found if name.endswith(".safetensors")}
    assert found - shards == {
        "manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/special.txt",
        "recipe.yaml",
    }
    assert saved.num_bytes == sum((folder / f).stat().st_size for f in found - {"manifest.json"})
    kinds = [{name.split(".")[0] for name in load_file(folder / f)} for f in shards]
    assert all(len(kind) == 1 for kind in kinds), "weights and states share a file"
    manifest = verify(folder).manifest
    assert (manifest.step, manifest.run_id, manifest.world, manifest.is_best) == (
        120,
        "run-1",
        1,
        True,
    )
    assert manifest.meta == {"tokens": 7, "model": {"hidden_size": 6}}
    assert {n: e.shape for n, e in manifest.census.items()} == {
        n: tuple(t.shape) for n, t in whole(1).items()
    }


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    for path in (tmp_path / "step-00000001").iterdir():
        raw = path.read_bytes()
        assert raw[:1] != b"\x80" and not raw.startswith(b"PK"), path
        assert json.loads(
            raw if path.suffix == ".json" else raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        )


@pytest.mark.parametrize("seconds", [0.3], ids=["slow-disk"])
def test_background_save_has_the_values_of_its_step(tmp_path: Path, seconds: float) -> None:
    state, done = whole(1), []
    saving = saver(tmp_path, writer=faulty_disk.slow(seconds), on_saved=done.append)
    saving.save(whole(9), step=9, meta={})  # fills the buffers that the next save writes over
    started = time.perf_counter()
    meta = {"tokens": [1]}
    saving.save(state, step=10, meta=meta)
    returned_s = time.perf_counter() - started
    for tensor in state.values():
        tensor += 1  # training goes on
    meta["tokens"].append(2)
    assert len(done) == 1, "the second save has waited for the first, and runs now"
    saving.wait()
    assert [s.step for s in done] == [9, 10] and done[1].took_s > seconds
    assert done[1].blocked_s < min(seconds, returned_s)
    assert_bitwise_equal(read(tmp_path / "step-00000010"), whole(1))
    assert_bitwise_equal(read(tmp_path / "step-00000009"), whole(9))
    assert verify(tmp_path / "step-00000010").manifest.meta == {"tokens": [1]}
    saving.close()


def test_foreground_save_copies_nothing_and_returns_when_done(tmp_path: Path) -> None:
    saving = saver(tmp_path, background=False)
    saved = saving.save(whole(1), step=1, meta={})
    assert saved is not None and saved.folder.is_dir()
    assert_bitwise_equal(read(saved.folder), whole(1))


def test_the_same_checkpoint_again_is_left_alone(tmp_path: Path) -> None:
    first = saver(tmp_path).save(whole(1), step=1, meta={"a": 1}, block=True)
    assert first is not None
    before = {p.name: p.stat().st_ino for p in first.folder.iterdir()}
    again = saver(tmp_path).save(whole(1), step=1, meta={"a": 1}, block=True)
    assert again is not None and not again.is_new and again.num_bytes == first.num_bytes
    assert {p.name: p.stat().st_ino for p in first.folder.iterdir()} == before


@pytest.mark.parametrize(
    "seed, meta, is_best",
    [(2, {"a": 1}, False), (1, {"a": 2}, False), (1, {"a": 1}, True)],
    ids=["tensors", "meta", "best"],
)
def test_the_same_step_with_other_content_replaces_it(
    tmp_path: Path, seed: int, meta: dict[str, int], is_best: bool
) -> None:
    saver(tmp_path).save(whole(1), step=1, meta={"a": 1}, block=True)
    saved = saver(tmp_path).save(whole(seed), step=1, meta=meta, is_best=is_best, block=True)
    assert saved is not None and saved.is_new and "replaces" in saved.notes[0]
    assert os.listdir(tmp_path) == ["step-00000001"]
    good = verify(saved.folder)
    assert (good.manifest.meta, good.manifest.is_best) == (meta, is_best)
    assert_bitwise_equal(read(saved.folder), whole(seed))


def damage(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    "spoil, kind",
    [
        (damage, "old"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"{}"), "bad"),
        (lambda folder: (folder / "manifest.json").unlink(), "bad"),
    ],
    ids=["tensor", "manifest", "no-manifest"],
)
def test_a_damaged_folder_of_that_name_is_replaced(tmp_path: Path, spoil, kind: str) -> None:
    first = saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    assert first is not None
    spoil(first.folder)
    saved = saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    assert saved is not None and saved.is_new
    assert_bitwise_equal(read(saved.folder), whole(1))
    kept = [name for name in os.listdir(tmp_path) if name != saved.folder.name]
    assert [name.split(".")[1][:4] for name in kept] == ([] if kind == "old" else ["bad-"])


def test_another_runs_folder_of_that_name_is_kept_whole(tmp_path: Path) -> None:
    saver(tmp_path, run_id="other").save(whole(1), step=1, meta={}, block=True)
    saved = saver(tmp_path).save(whole(2), step=1, meta={}, block=True)
    assert saved is not None and "kept as step-00000001.alien-" in saved.notes[0]
    (aside,) = tmp_path.glob("step-00000001.alien-*")
    assert verify(aside).manifest.run_id == "other"
    assert_bitwise_equal(read(aside), whole(1))
    assert_bitwise_equal(read(saved.folder), whole(2))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_dropping_any_tensor_is_found(tmp_path: Path, name: str) -> None:
    state = whole(1)
    del state[name]
    with pytest.raises(CheckpointError, match=f"tensor={name}: is in the live model"):
        saver(tmp_path).save(state, step=1, meta={}, expected=NAMES, block=True)
    assert os.listdir(tmp_path) == []


def test_an_unknown_tensor_is_found(tmp_path: Path) -> None:
    state = whole(1) | {"model.ghost": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"tensor=model\.ghost: is in the state and not"):
        saver(tmp_path).save(state, step=1, meta={}, expected=NAMES)


def test_a_write_that_lies_is_found_before_the_checkpoint_counts(tmp_path: Path) -> None:
    saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    saving = saver(tmp_path, writer=faulty_disk.lying())
    with pytest.raises(StorageError, match="does not read back as written .*bytes are damaged"):
        saving.save(whole(2), step=2, meta={}, block=True)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_meta_must_be_json(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        saver(tmp_path).save(whole(1), step=1, meta={"loss": float("nan")})
    with pytest.raises((TypeError, ValueError)):
        saver(tmp_path).save(whole(1), step=1, meta={"path": Path("x")})


def census_job(rank: int, world: int, root: str) -> Saved:
    live = sharded(whole(3))
    saving = saver(Path(root), peers=Peers(dist.new_group(backend="gloo")))
    saved = saving.save(live, step=4, meta={}, expected=NAMES, block=True)
    saving.close()
    assert saved is not None
    return saved


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_experts_are_there_once_and_equal_to_the_live_ones(tmp_path: Path, world: int) -> None:
    run_ranks(world, census_job, str(tmp_path))
    folder, live = tmp_path / "step-00000004", whole(3)
    manifest = verify(folder).manifest
    assert manifest.census.keys() == NAMES and manifest.world == world
    for name in NAMES:
        # read with the library, not with ours
        rows = [load_file(folder / file)[name] for file, _ in manifest.pieces(name)]
        assert torch.equal(torch.cat(rows), live[name]), name
    for name in (n for n in NAMES if "experts" in n):
        experts = [p.first_row + i for _, p in manifest.pieces(name) for i in range(p.num_rows)]
        assert experts == list(range(len(live[name])))


def disagreeing_job(rank: int, world: int, root: str) -> str:
    live = sharded(whole(3))
    if rank == 1:
        del live["optim.exp_avg.model.norm.weight"]
    saving = saver(Path(root), peers=Peers(dist.new_group(backend="gloo")))
    with pytest.raises(CheckpointError, match="rank=1: differs from rank 0") as caught:
        saving.save(live, step=4, meta={}, block=True)
    saving.close()
    return str(caught.value)


def test_ranks_that_disagree_all_refuse(tmp_path: Path) -> None:
    assert len(set(run_ranks(2, disagreeing_job, str(tmp_path)))) == 1
    assert os.listdir(tmp_path) == []


def test_files_are_bounded_and_hold_one_kind() -> None:
    rows = Entry((64, 2**16), "F32")  # 16 MiB
    census = {f"{kind}.{i}": rows for kind in ("model", "optim.exp_avg") for i in range(9)}
    for world in (1, 2):
        files: dict[int, list[str]] = {}
        for name, number in plan_files(census, world).items():
            files.setdefault(number, []).append(name)
        assert sorted(files) == list(range(1, len(files) + 1))
        for names in files.values():
            assert len({name.split(".")[0] for name in names}) == 1
            assert len(names) * 2**24 // world <= FILE_BYTES
    assert len(plan_files({"model.big": Entry((10**6, 4096), "F32")}, 1)) == 1


def test_preflight_warns_and_refuses(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    root = tmp_path / "not" / "yet" / "there"
    assert preflight(root, free // 100, keep=3) is None
    warning = preflight(root, free // 3, keep=3)
    assert warning is not None and "checkpoint.keep=3" in warning
    with pytest.raises(StorageError, match="free=.*: a checkpoint needs"):
        preflight(root, 2 * free, keep=1)
    assert not root.exists()


def test_a_save_without_room_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(StorageError, match="free=100 B: a checkpoint needs"):
        saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    assert os.listdir(tmp_path) == []


def test_manifest_of_a_save_is_read_by_anyone(tmp_path: Path) -> None:
    saved = saver(tmp_path).save(whole(1), step=1, meta={}, block=True)
    assert saved is not None
    values = json.loads((saved.folder / manifests.FILE).read_text())
    assert values["format_version"] == 1 and values["holds"] == "training"

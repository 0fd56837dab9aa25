"""Ragged rows, wherever they live: saved on any number of ranks, loaded on any other, bitwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.load import load
from ptm.checkpoint.save import Saver
from ptm.checkpoint.verify import verify
from ptm.common.errors import CheckpointError, StorageError
from ptm.mesh.peers import Peers
from tests.support.ranks import run_ranks
from tests.support.state import BIAS, FileRows, assert_bitwise_equal, empty, paged, sharded, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORLDS = [1, 2, 3, 4]
W1 = "model.layers.0.mlp.experts.w1"


def values(seed: int = 5) -> dict[str, Tensor]:
    return whole(seed) | {BIAS: torch.linspace(-1, 1, 5)}


def saver(root: Path, peers: Peers | None = None, **options: Any) -> Saver:
    return Saver(root, CheckpointConfig(), run_id="r", peers=peers, **options)


def assert_rows_are(state: dict[str, FileRows], wanted: dict[str, Tensor]) -> None:
    found = {name: rows.read() for name, rows in state.items()}
    mine = {
        name: wanted[name].reshape(rows.shape)[rows.first_row : rows.first_row + rows.num_rows]
        for name, rows in state.items()
    }
    assert_bitwise_equal(found, mine)


# ------------------------------------------------------------------------------------ any world


def save_job(rank: int, world: int, root: str) -> int:
    """Saves steps 10 x world + i, the ranges cut elsewhere for each; returns tensors without rows
    on this rank."""
    saving = saver(Path(root) / f"w{world}", Peers(dist.new_group(backend="gloo")))
    without = 0
    for i in range(3):
        folder = Path(root) / f"live-{world}"
        state = paged(values(), folder, rank=rank, world=world, seed=10 * world + i)
        without += sum(rows.num_rows == 0 for rows in state.values())
        saving.save(state, step=10 * world + i, meta={"saved_on": world}, block=i > 0)
    saving.close()
    return without


def load_job(rank: int, world: int, root: str) -> list[int]:
    peers = Peers(dist.new_group(backend="gloo"))
    saved_on = []
    for folder in sorted(Path(root).glob("step-*")):
        into = paged(empty(values()), Path(root) / f"into-{world}", rank=rank, world=world, seed=3)
        saved_on.append(load(verify(folder, peers), into, peers=peers)["saved_on"])
        assert_rows_are(into, values())
    return saved_on


def test_ragged_rows_saved_on_any_world_load_on_any_other(tmp_path: Path) -> None:
    for world in WORLDS:
        without = run_ranks(world, save_job, str(tmp_path))
        assert world == 1 or sum(without) > 0, "some rank has no row of some tensor"
        for folder in (tmp_path / f"w{world}").iterdir():
            shutil.move(folder, tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == 3 * len(WORLDS)
    for world in WORLDS:
        wanted = [saved_on for saved_on in WORLDS for _ in range(3)]
        assert run_ranks(world, load_job, str(tmp_path)) == [wanted] * world


# ----------------------------------------------------- stacked experts, in either of two shapes


def resume_job(rank: int, world: int, root: str, was_stacked: bool) -> None:
    """Before the paged engine experts were saved as (E, R, C), cut by experts."""
    peers, folder = Peers(dist.new_group(backend="gloo")), Path(root) / "step-00000001"
    if was_stacked:
        into = paged(empty(whole(5)), Path(root) / "into", rank=rank, world=world, seed=world)
        load(verify(folder, peers), into, peers=peers)
        assert_rows_are(into, whole(5))
    else:
        stacked = sharded(empty(whole(5)))
        load(verify(folder, peers), stacked, peers=peers)
        assert_bitwise_equal(stacked, sharded(whole(5)))


def first_job(rank: int, world: int, root: str, is_stacked: bool) -> None:
    saving = saver(Path(root), Peers(dist.new_group(backend="gloo")))
    live = sharded(whole(5)) if is_stacked else paged(whole(5), Path(root), rank=rank, world=world)
    saving.save(live, step=1, meta={}, block=True)
    saving.close()


@pytest.mark.parametrize("is_stacked", [True, False], ids=["3-D to 2-D", "2-D to 3-D"])
def test_experts_load_from_and_into_both_shapes(tmp_path: Path, is_stacked: bool) -> None:
    run_ranks(2, first_job, str(tmp_path), is_stacked)
    shape = verify(tmp_path / "step-00000001").manifest.census[f"model.{W1}"].shape
    assert shape == ((5, 4, 6) if is_stacked else (20, 6))
    for world in (1, 3):
        run_ranks(world, resume_job, str(tmp_path), is_stacked)


def test_other_matrices_of_as_many_numbers_are_refused(tmp_path: Path) -> None:
    saver(tmp_path).save({"model.w": torch.ones(5, 4, 6)}, step=1, meta={}, block=True)
    good = verify(tmp_path / "step-00000001")
    load(good, {"model.w": torch.zeros(20, 6)})
    for shape in [(4, 5, 6), (10, 12), (24, 5), (120,), (5, 24), (1, 20, 6)]:
        into = torch.zeros(shape)
        with pytest.raises(CheckpointError, match=r"model\.w: is F32 \[5, 4, 6\], the model has"):
            load(good, {"model.w": into})
        assert not into.any()


# ---------------------------------------------------------------------- with and without a copy


@pytest.mark.parametrize("how", ["background", "block", "stream"])
def test_rows_are_those_of_the_step_with_and_without_a_copy(tmp_path: Path, how: str) -> None:
    state = paged(values(), tmp_path / "live", rank=0, world=1)
    saving = saver(tmp_path / "c", stream=how == "stream")
    saving.prepare(state)
    assert all(rows.reads == 0 for rows in state.values())
    saved = saving.save(state, step=1, meta={}, block=how == "block")
    assert (saved is None) == (how == "background")
    for rows in state.values():
        assert rows.reads == 1, "hashed and written in one pass"
        rows.write(torch.zeros_like(rows.read()))  # training goes on
    saving.close()
    into = paged(empty(values()), tmp_path / "into", rank=0, world=1)
    load(verify(tmp_path / "c" / "step-00000001"), into)
    assert_rows_are(into, values())


def test_the_same_step_again_is_compared_and_left_alone(tmp_path: Path) -> None:
    state = paged(values(), tmp_path / "live", rank=0, world=1)
    saving = saver(tmp_path / "c", stream=True)
    saving.save(state, step=1, meta={})
    again = saving.save(state, step=1, meta={})
    assert again is not None and not again.is_new
    state[BIAS].write(torch.zeros(5))
    other = saving.save(state, step=1, meta={})
    assert other is not None and other.is_new and "replaces" in other.notes[0]
    saving.close()


def test_moments_of_a_parameter_are_read_one_after_the_other(tmp_path: Path) -> None:
    order: list[str] = []

    class Noted(FileRows):
        def read(self) -> Tensor:
            order.append(self.file.name.removesuffix(".0"))
            return super().read()

    state = paged(values(), tmp_path / "live", rank=0, world=1)
    noted = {n: Noted(r.file, r.shape, 0, r.num_rows) for n, r in state.items()}
    saver(tmp_path / "c", stream=True).save(noted, step=1, meta={})
    weights = [name for name in order if name.startswith("model.")]
    firsts, seconds = order[len(weights) :: 2], order[len(weights) + 1 :: 2]
    assert order[: len(weights)] == sorted(weights) and len(set(order)) == len(state)
    assert [name.replace("exp_avg", "exp_avg_sq") for name in firsts] == seconds


# -------------------------------------------------------------------------------- what is wrong


def wrong_job(rank: int, world: int, root: str) -> list[str]:
    """Rows that nobody has, that two have, and rows that a disk cannot give: all ranks raise."""
    peers = Peers(dist.new_group(backend="gloo"))
    saving = saver(Path(root) / "c", peers, stream=True)
    heard = []
    for wrong in ("nobody", "both", "disk"):
        state = paged(values(), Path(root) / "live", rank=rank, world=world)
        kind: type[Exception] = CheckpointError
        if wrong == "nobody" and rank == 0:
            state[BIAS] = FileRows(Path(root) / "b", (5,), 0, 3)
        if wrong == "both" and rank == 1:
            state[BIAS] = FileRows(Path(root) / "b", (5,), 2, 3)
        if wrong == "disk":
            kind = StorageError
            if rank == 0:
                state[BIAS] = Unreadable(Path(root) / "b", (5,), 0, 5)
        with pytest.raises(kind) as caught:
            saving.save(state, step=1, meta={})
        heard.append(str(caught.value))
    state = paged(values(), Path(root) / "live", rank=rank, world=world)
    assert saving.save(state, step=1, meta={}) is not None, "and the next save is good"
    saving.close()
    return heard


class Unreadable(FileRows):
    def read(self) -> Tensor:
        raise StorageError("page 7: its bytes are damaged")


def test_rows_that_are_wrong_are_told_by_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, wrong_job, str(tmp_path))
    assert first == second
    for text, wanted in zip(first, ["rows up to 3 of 5", "row 2 twice", "page 7: its bytes"]):
        assert wanted in text


def test_dcp_reads_what_its_writer_here_has_written(tmp_path: Path) -> None:
    saver(tmp_path).save(whole(5), step=1, meta={}, block=True)
    into: dict[str, Any] = empty(whole(5))
    reader = HuggingFaceStorageReader(str(tmp_path / "step-00000001"))
    dcp_load(into, storage_reader=reader, no_dist=True)
    assert_bitwise_equal(into, whole(5))


# --------------------------------------------------------------------------------------- memory

MIB = 2**20
TENSOR = (8192, 1024)  # 32 MiB


class MadeRows:
    """Rows that are computed when they are read, and checked when they are written."""

    shape, first_row, num_rows, dtype = TENSOR, 0, TENSOR[0], torch.float32

    def __init__(self, seed: int) -> None:
        self.seed, self.is_checked = seed, False

    def read(self) -> Tensor:
        rows = torch.arange(self.seed, self.seed + TENSOR[0] * TENSOR[1], dtype=torch.float32)
        return rows.view(TENSOR)

    def write(self, rows: Tensor) -> None:
        self.is_checked = torch.equal(rows, self.read())


def most_resident(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def memory_job(rank: int, world: int, root: str) -> tuple[int, int]:
    state = {f"model.t{i:02d}": MadeRows(i) for i in range(16)}
    saving = saver(Path(root), stream=True)
    saving.save({"model.x": torch.ones(9)}, step=1, meta={}, block=True)  # imports
    before = most_resident(reset=True)
    saving.prepare(state)
    saved = saving.save(state, step=2, meta={})
    saving.close()
    saved_bytes = most_resident() - before
    assert saved is not None and saved.num_bytes > 512 * MIB
    good = verify(saved.folder)
    before = most_resident(reset=True)
    load(good, state)
    assert all(rows.is_checked for rows in state.values())
    return saved_bytes, most_resident() - before


def test_a_save_and_a_load_take_the_memory_of_few_tensors(tmp_path: Path) -> None:
    ((saved_bytes, loaded_bytes),) = run_ranks(1, memory_job, str(tmp_path))
    assert saved_bytes < 2 * 32 * MIB, f"{saved_bytes / MIB:.0f} MiB for 512 in tensors of 32"
    # `write` here makes a second copy to compare with.
    assert loaded_bytes < 3 * 32 * MIB, f"{loaded_bytes / MIB:.0f} MiB"
    print(f"{saved_bytes / MIB:.0f} and {loaded_bytes / MIB:.0f} MiB")

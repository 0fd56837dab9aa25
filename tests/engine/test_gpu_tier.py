"""Pages in device memory: any prefix of any size changes no bit, and nobody uses a copy too early.

The device is memory of the host under streams that are as late as their events allow
(tests/support/streams.py). Tests marked `gpu` run the same on CUDA; they have not met a device yet.
"""

import hashlib
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ptm.engine.config import EngineConfig, MomentsKind, UpdateKind
from ptm.engine.layout import Format, PageMap, Resident
from ptm.mesh.mesh import make_mesh
from tests.support.mesh import mesh_of_test
from tests.support.paged import MODEL, make_engine, run_steps, whole_state
from tests.support.ranks import run_ranks
from tests.support.streams import LateStream, LateStreams

WIDE = replace(MODEL, moe_intermediate_size=512, num_experts=8)
BF16, FP32 = torch.bfloat16, torch.float32


def _one(mesh, zero, dtype, steps, keys, clips=(1.0,), streams=None):
    """Losses and a digest of the states after `steps`, and what the engine reports."""
    config = EngineConfig(page_mib=1, ep=mesh.ep.size(), **keys)
    engine = make_engine(mesh, zero=zero, dtype=dtype, config=config, model=WIDE, streams=streams)
    losses = []
    for step in steps:
        engine.clip = clips[step % len(clips)]
        losses += [o.loss.hex() for o in run_steps(engine, mesh, range(step, step + 1), **TWO)]
    digest = hashlib.sha256()
    for _, (_, rows) in sorted(whole_state(engine).items()):
        digest.update(rows.tobytes())
    report, budget = engine.report(), engine.tiers.budget
    engine.close()
    return (losses, digest.hexdigest()), report, budget


TWO = {"micro_batches": 2}


def _prefixes(rank, world, ep, zero, dtype, moments, folder):
    """The result without a device, and with prefixes of several lengths."""
    mesh, common, steps = mesh_of_test(rank, world, ep), {"moments": moments}, range(8)
    wanted, _, _ = _one(mesh, zero, dtype, steps, common)
    found, where = {}, []
    for i, pages in enumerate([0, 1, 2, 3, 5, 8, 1000]):
        keys = common | {"gpu_bytes": f"{pages}MiB"}
        if folder:
            keys |= {"ssd_path": f"{folder}/{i}", "journal_every": 1 + i % 3}
            # The least memory of the host, so that pages leave it; without room for more, a page
            # that is let go of under a copy is soon another.
            _, _, budget = _one(mesh, zero, dtype, range(0), keys, streams=LateStreams(world))
            keys |= {"cpu_bytes": f"{budget.moving_bytes + 8 * 2**20}B"}
        found[pages], report, budget = _one(
            mesh, zero, dtype, steps, keys, streams=LateStreams(world)
        )
        where.append((budget.resident, budget.num_host_pages, report["pages_writes"]))
    return wanted, found, where


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    (1, 1, 3, BF16, MomentsKind.fp32, False),
    _slow(2, 1, 3, BF16, MomentsKind.int8, False),
    (2, 2, 1, FP32, MomentsKind.fp32, False),
    _slow(1, 1, 3, FP32, MomentsKind.int8, True),
    _slow(2, 1, 3, BF16, MomentsKind.fp32, True),
    _slow(2, 2, 1, BF16, MomentsKind.int8, True),
    _slow(1, 1, 1, BF16, MomentsKind.fp32, True),
]


@pytest.mark.parametrize("world, ep, zero, dtype, moments, has_disk", CASES)
def test_no_prefix_changes_a_bit(world, ep, zero, dtype, moments, has_disk, tmp_path):
    for i in range(7):
        (tmp_path / str(i)).mkdir()
    folder = str(tmp_path) if has_disk else None
    args = (ep, zero, dtype, moments, folder)
    for wanted, found, where in run_ranks(world, _prefixes, *args, timeout_s=280):
        for pages, result in found.items():
            assert result == wanted, f"{pages} pages"
        assert where[0][0] == Resident() and where[-1][1] == 0, where
        assert all(sum(w[0]) > 0 for w in where[2:]) and where[3][1] > 0, where
        if has_disk:
            assert all(writes > 0 for _, _, writes in where), where


def _resume(rank, world, dtype, folder):
    """Six steps, a stop, six more with another prefix; and twelve without a device."""
    mesh = mesh_of_test(rank, world)
    wanted, _, _ = _one(mesh, 3, dtype, range(12), {})
    found = []
    for i, (first, second) in enumerate([("5MiB", "3MiB"), ("1000MiB", None), (None, "1000MiB")]):
        keys = {"ssd_path": f"{folder}/{i}"}
        parts = []
        for steps, gpu in ((range(6), first), (range(6, 12), second)):
            more = {} if gpu is None else {"gpu_bytes": gpu}
            streams = None if gpu is None else LateStreams(world)
            parts.append(_one(mesh, 3, dtype, steps, keys | more, streams=streams)[0])
        found.append((parts[0][0] + parts[1][0], parts[1][1]))
    return wanted, found


@pytest.mark.parametrize("world, dtype", [(1, BF16), (2, FP32)])
def test_a_run_goes_on_from_its_commits_with_any_other_prefix(world, dtype, tmp_path):
    for i in range(3):
        (tmp_path / str(i)).mkdir()
    for wanted, found in run_ranks(world, _resume, dtype, str(tmp_path), timeout_s=240):
        assert found == [wanted] * 3


def _wrong_guess(rank, world, folder):
    mesh, clips = mesh_of_test(rank, world), (100.0, 100.0, 0.05, 100.0, 100.0, 100.0)
    wanted, _, _ = _one(mesh, 3, BF16, range(9), {}, clips)
    keys = {"ssd_path": folder, "gpu_bytes": "5MiB"}
    found, report, _ = _one(mesh, 3, BF16, range(9), keys, clips, LateStreams(world))
    return wanted, found, report


@pytest.mark.parametrize("world", [1, 2])
def test_what_was_updated_on_a_wrong_guess_is_read_back(world, tmp_path):
    for wanted, found, report in run_ranks(world, _wrong_guess, str(tmp_path)):
        assert found == wanted
        assert 1 <= report["updates_undone"] < report["updates_guessed"]


def _late(rank, world):
    mesh, keys = mesh_of_test(rank, world), {"update": UpdateKind.bounded}
    wanted, _, _ = _one(mesh, 3, BF16, range(6), keys)
    device = keys | {"gpu_bytes": "5MiB"}
    return wanted, _one(mesh, 3, BF16, range(6), device, streams=LateStreams(world))[0]


def test_late_updates_are_as_late_with_a_device():
    for wanted, found in run_ranks(2, _late):
        assert found == wanted


def _order(rank, world, forgets):
    """Results and what was told to wait for what, with one stream that does not wait."""
    mesh, keys = mesh_of_test(rank, world), {"gpu_bytes": "5MiB"}
    streams = LateStreams(world)
    if forgets:
        stream = getattr(streams, forgets)
        stream.wait_event = lambda event: None
    found = _one(mesh, 3, BF16, range(3), keys, streams=streams)[0]
    return found, sorted(set(streams.waits))


def test_every_stream_waits_for_those_before_it():
    ((wanted, waits),) = run_ranks(1, _order, None)
    assert {
        ("gather", "compute"),  # a frame's last use, before it is filled
        ("gather", "update"),  # a unit's update, before its weights are read
        ("compute", "gather"),  # weights, before they are used
        ("land", "compute"),  # gradients, before they are added up
        ("compute", "land"),  # sums, before their buffer is filled again or they are used
        ("update", "compute"),  # all of that, before the update
    } <= set(waits), waits
    ((found, _),) = run_ranks(1, _order, "compute")
    assert found != wanted, "the streams of this test would not notice a gather that is not awaited"


class Pages:
    """A store that says which pages are held."""

    def __init__(self, pages):
        self.bytes = [torch.zeros(pages.page_bytes, dtype=torch.uint8) for _ in pages.durable]
        self.held = []

    def hold(self, page, *, write=False):
        self.held.append(page)
        return self.bytes[page]

    def release(self, page, *, dirty=False):
        self.held.remove(page)


def test_a_page_is_held_until_its_copy_is_done():
    from ptm.engine.states import PagedStates

    fmt = Format(weight_bytes=2, is_split=True, is_int8=False)
    pages = PageMap(20_000, 4096, fmt)
    store, streams = Pages(pages), LateStreams(1)
    states = PagedStates(store, pages, BF16, streams=streams, most_reading=3)  # type: ignore[arg-type]
    out = torch.full((7 * 2048,), torch.nan, dtype=BF16)
    states.read_weights(0, out.numel(), out)
    assert store.held == [4, 5, 6] and bool(out[: 4 * 2048].isfinite().all())
    assert bool(out[4 * 2048 :].isnan().all()), "the copies of held pages are not made yet"
    assert isinstance(stream := streams.current(), LateStream)
    stream.record_event().synchronize()
    states.settle(3)
    assert store.held == [] and bool(out.isfinite().all())


@pytest.mark.parametrize("numel", [1, 128, 5_000, 100_000])
def test_resident_pages_are_the_longest_prefix_that_fits(numel):
    pages = PageMap(numel, 4096, Format(weight_bytes=2, is_split=True, is_int8=True))
    kinds = (pages.weights, pages.states, pages.grads)
    for most in range(pages.num_pages + 2):
        found = pages.resident(most)
        assert sum(found) <= most
        ends = [n * k.per_page if n < k.num_pages else numel for k, n in zip(kinds, found)]
        beyond = (
            min(e + k.per_page for e, k, n in zip(ends, kinds, found) if n < k.num_pages)
            if (sum(found) < pages.num_pages)
            else numel
        )
        assert all(n == k.num_pages or (n + 1) * k.per_page >= beyond for k, n in zip(kinds, found))
    assert sum(pages.resident(pages.num_pages)) == pages.num_pages


def _refused(rank, world):
    make_engine(mesh_of_test(rank, world), config=EngineConfig(gpu_bytes="8GiB"))


def test_device_memory_is_refused_where_there_is_no_device():
    with pytest.raises(AssertionError, match="engine.gpu_bytes=8GiB: there is no accelerator here"):
        run_ranks(1, _refused)


def _cuda_mesh(rank, world, folder):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.cuda.set_device(rank)
    init = f"file://{folder}/cuda-rendezvous"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=init, rank=rank, world_size=world)
    background = dist.new_group(backend="gloo")
    assert isinstance(background, dist.ProcessGroup)
    return make_mesh(torch.device("cuda", rank), background)


def _on_cuda(rank, world, dtype, folder):
    """Losses of one prefix after another, and of one of them twice and after a stop."""
    mesh, found = _cuda_mesh(rank, world, folder), {}
    for name, gpu in {"none": "0B", "part": "5MiB", "again": "5MiB", "all": "1000MiB"}.items():
        found[name] = _one(mesh, 3, dtype, range(12), {"gpu_bytes": gpu})[0]
    keys = {"gpu_bytes": "5MiB", "ssd_path": folder}
    first = _one(mesh, 3, dtype, range(6), keys)[0]
    second = _one(mesh, 3, dtype, range(6, 12), keys)[0]
    found["resumed"] = (first[0] + second[0], second[1])
    dist.destroy_process_group()
    return found


def _check_cuda(world, dtype, tmp_path):
    args = (dtype, str(tmp_path))
    for found in run_ranks(world, _on_cuda, *args, timeout_s=280, process_group=False):
        assert found["again"] == found["part"] and found["resumed"] == found["part"]
        # The device's AdamW rounds otherwise than the host's, so prefixes differ in last bits.
        losses = {name: [float.fromhex(x) for x in some[0]] for name, some in found.items()}
        for name in ("part", "all"):
            assert losses[name] == pytest.approx(
                losses["none"], rel=1e-2 if dtype == BF16 else 1e-4
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_prefix_on_cuda_repeats_itself_and_goes_on(dtype, tmp_path):
    _check_cuda(1, dtype, tmp_path)


@pytest.mark.multi_gpu
def test_a_prefix_on_two_gpus_repeats_itself_and_goes_on(tmp_path):
    _check_cuda(2, BF16, tmp_path)

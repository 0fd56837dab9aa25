"""The trace of a step: recorded from threads, written by hand, saved, and asked for the future."""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.common.errors import DataError
from ptm.engine.trace import Access, Trace, Tracer, UnitWork, step_phases, synthetic_trace


def trace_of(pages: list[int]) -> Trace:
    return Trace(tuple(Access(p, float(i), "forward a", False) for i, p in enumerate(pages)), 1e3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_next_use_is_the_first_use_after(pages: list[int]) -> None:
    trace, twice = trace_of(pages), pages + pages
    for position in range(len(pages)):
        for page in set(pages):
            naive = next(i for i in range(position + 1, len(twice)) if twice[i] == page)
            assert trace.next_use(page, position) == naive
        assert trace.following[position] == trace.next_use(pages[position], position)
        assert trace.next_use(99, position) > 2 * len(pages) + position - 1


def test_tracer_keeps_the_notes_of_all_threads_in_order_of_time() -> None:
    tracer = Tracer(kinds=[("weights", 100)])
    tracer.note(7, True, "evaluate")
    assert not tracer.is_recording
    tracer.begin()
    threads = [
        threading.Thread(
            target=lambda k=k: [tracer.note(k, k == 0, f"update {k}") for _ in range(200)]
        )
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace = tracer.end()
    times = [access.at_s for access in trace.accesses]
    assert len(times) == 800 and times == sorted(times) and times[-1] <= trace.step_s
    assert {s.what: (s.num_accesses, s.num_writes) for s in trace.per_unit()} == {
        f"update {k}": (200, 200 * (k == 0)) for k in range(4)
    }
    assert trace.kind_of(3) == "weights" and trace.kind_of(100) == "pages"


def test_waits_are_left_out_of_the_times() -> None:
    tracer = Tracer()
    tracer.begin()
    tracer.note(0, False, "forward a")
    began = time.perf_counter()
    time.sleep(0.05)
    waited_s = time.perf_counter() - began
    tracer.note(1, False, "forward a", waited_s)
    trace = tracer.end()
    assert trace.stall_s == pytest.approx(waited_s, abs=1e-5)
    assert trace.step_s < waited_s


def test_a_saved_trace_comes_back_equal(tmp_path: Path) -> None:
    tracer = Tracer(kinds=[("weights", 2), ("optimizer", 4)])
    tracer.begin()
    for page in (0, 1, 3, 0, 1):
        tracer.note(page, page == 3, f"forward {page // 2}", 1e-5)
    trace = tracer.end()
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace


def test_a_large_trace_is_a_small_file(tmp_path: Path) -> None:
    pages = list(range(5000)) * 2
    synthetic_trace([("forward a", pages, False, 1.0)]).save(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size < 10 * len(pages)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": 9}',
        '{"format": 1, "step_us": 1, "stall_us": 0, "kinds": [], "pages": [1], "after_us": [],'
        ' "what": [], "writes": ""}',
    ],
    ids=["empty", "nothing", "list", "format", "lengths"],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(DataError, match=r"trace\.json: is no trace .*; record it anew"):
        Trace.load(tmp_path / "trace.json")


def test_a_synthetic_step_goes_forward_backward_and_updates() -> None:
    units = [
        UnitWork(
            name=name,
            weights=[k],
            gradients=[20 + k],
            updates=[(10 + k, [k], [20 + k])],
            forward_s=1.0,
            backward_s=2.0,
            update_s=0.5,
        )
        for k, name in enumerate("ab")
    ]
    trace = synthetic_trace(step_phases(units, micro_batches=2))
    micro_batch = [(0, 0), (1, 0), (1, 0), (21, 1), (0, 0), (20, 1)]
    update = [(10, 1), (0, 1), (20, 0), (11, 1), (1, 1), (21, 0)]
    assert [(a.page, a.is_write) for a in trace.accesses] == 2 * micro_batch + update
    assert trace.step_s == 2 * 2 * 3.0 + 2 * 0.5
    seconds = {s.what: s.seconds for s in trace.per_unit()}
    assert seconds == {
        "forward a": 2.0, "forward b": 2.0, "backward b": 4.0, "backward a": 4.0,
        "update a": 0.5, "update b": 0.5,
    }  # fmt: skip

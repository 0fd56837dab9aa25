"""The CUDA kernels without a GPU: their own source, its threads as fibers, under the tests that the
CPU's kernels pass; and proof that a missing barrier shows there."""

import ctypes

import pytest

from tests.support.asan import needs_asan
from tests.support.emulated import (
    ROOT,
    RUN,
    build_emulated,
    cuda_sources,
    needs_gxx,
    run,
    run_tests,
)

# A row of THREADS numbers turned around through shared memory, and one barrier too few or too many.
REVERSE = """
#include "{root}/csrc/common/device.h"
namespace PTM_NAMESPACE {{
struct Reverse {{
  static constexpr int THREADS = 64;
  const float* from;
  float* to;
  PTM_BODY void operator()() const {{
    float* room = shared_memory<float>();
    room[thread_id()] = from[thread_id()];
    {barrier};
    to[thread_id()] = room[THREADS - 1 - thread_id()];
  }}
}};
}}
PTM_EXPORT(reverse)(const float* from, float* to, void* stream) {{
  using namespace PTM_NAMESPACE;
  return launch(Reverse{{from, to}}, 1, 256, stream);
}}
"""
BARRIERS = {
    "one": "sync_block()",
    "missing": "",
    "of the warp": "sync_warp()",
    "not reached by all": "if (thread_id() != 3) sync_block()",
}
TIMED_OUT = 3
# What makes tests for a GPU tests for the library that stands in for the CPU's.
ON_THE_CPU = {
    'DEVICE = "cuda"': 'DEVICE = "cpu"',
    "    pytest.mark.gpu,\n": "",
    "native.forced_cuda(True)": 'native.forced("portable")',
    "torch.accelerator.synchronize()": "pass",
    "with torch.cuda.stream(torch.cuda.Stream()):": "if True:",
}


def write_reverse(folder, barrier):
    source = folder / "reverse.cu"
    source.write_text(REVERSE.format(root=ROOT, barrier=BARRIERS[barrier]))
    return source


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_missing_shows(tmp_path, barrier):
    library = ctypes.CDLL(str(build_emulated(tmp_path, [write_reverse(tmp_path, barrier)])))
    row = ctypes.c_float * 64
    numbers = row(*range(64))
    found = set()
    for order in (1, 2, 3):
        out = row()
        status = library.ptm_reverse_portable(numbers, out, ctypes.c_void_p(order))
        found.add((status, tuple(out)))
    if barrier == "one":
        assert found == {(0, tuple(reversed(numbers)))}
    elif barrier == "not reached by all":
        assert {status for status, _ in found} == {TIMED_OUT}
    else:
        assert len(found) > 1


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_emulated(tmp_path_factory.mktemp("emulated"), cuda_sources())


TESTS = {
    "adamw": "test_adamw_native.py",
    "add_pieces": "test_add_pieces_native.py",
    "fake_quant": "test_fake_quant_native.py",
    "moe_mlp": "test_moe_mlp_native.py",
    "moe_plan": "test_moe_mlp_native.py",
    "rmsnorm": "test_rmsnorm_native.py",
    "rope": "test_rope_native.py",
    "router": "test_router_native.py",
    "wq": "test_quant_linear.py",
}
FILES = sorted({f"tests/kernels/{name}" for name in TESTS.values()})
# Windows are other ranks', on CPUs; opcheck asks nothing of a kernel.
CHOSEN = "not torchs_rules and not knows_the_op and not windows"


@pytest.mark.slow
@needs_gxx
def test_bodies_pass_the_tests_of_the_cpus_kernels(library):
    assert {source.parent.name for source in cuda_sources()} == set(TESTS)
    done = run_tests(library, *FILES, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FILES:
        assert f"PASSED {file}" in done.stdout, done.stdout


@pytest.mark.slow
@needs_gxx
def test_the_tests_for_a_gpu_hold_in_emulation(library, tmp_path):
    """Their shapes and bounds: what fails on the first GPU should be the GPU's doing."""
    text = (ROOT / "tests" / "kernels" / "test_cuda_ops.py").read_text()
    for on_gpu, on_cpu in ON_THE_CPU.items():
        assert on_gpu in text, on_gpu
        text = text.replace(on_gpu, on_cpu)
    file = tmp_path / "test_ops_on_the_cpu.py"
    file.write_text(text)
    done = run_tests(library, str(file), "-k", "not is_refused and not nothing_waits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" not in done.stdout and " passed" in done.stdout, done.stdout


BREAK = """
import sys
from pathlib import Path
from ptm.kernels import native
native.LIBRARY = Path(sys.argv[1])
import torch
native.call("reverse", {row}, torch.ones(64))
"""
BROKEN = {
    "heap-buffer-overflow": "torch.ones(63)",
    "misaligned address": "torch.frombuffer(bytearray(257), dtype=torch.float32, offset=1)",
}


@pytest.mark.slow
@needs_asan
def test_no_body_leaves_its_memory(tmp_path):
    """Global, scratch or shared; nor is an address no multiple of what is read there. On a GPU the
    one may go unnoticed, and the other ends the process."""
    sources = [write_reverse(tmp_path, "one"), *cuda_sources()]
    library = build_emulated(tmp_path, sources, is_watched=True)
    for said, row in BROKEN.items():
        broken = run(library, BREAK.format(row=row), is_watched=True)
        assert broken.returncode and said in broken.stderr, broken.stderr
    chosen = f"{CHOSEN} and not number_of_threads"
    done = run(library, RUN, *FILES, "-k", chosen, is_watched=True)
    assert done.returncode == 0, done.stdout + done.stderr

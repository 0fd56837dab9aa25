"""The compiled kernels' own tests again, in a library that the compiler watches for accesses out of
bounds and for undefined behaviour."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptm.common import env
from tests.support.asan import asan, needs_asan
from tests.support.native import needs_library

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ["rmsnorm", "rope", "router", "adamw", "add_pieces", "fake_quant", "gptq", "moe_ep"]

BUILD = """
import sys
sys.path.insert(0, "csrc")
import build
ops = ["common", "roofline", *sys.argv[2:]]
build.build(__import__("pathlib").Path(sys.argv[1]), sanitize="address,undefined", ops=ops)
"""
RUN = """
import sys
from pathlib import Path
from ptm.kernels import native
native.LIBRARY = Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
# Bounds a kernel breaks on purpose: the tests must not pass because nothing is watched.
BREAK = """
import sys
from pathlib import Path
from ptm.kernels import native
native.LIBRARY = Path(sys.argv[1])
import torch
x = torch.ones(64)
native.call("roofline_triad", x, x, x, 64 + 16)
"""


@pytest.mark.slow
@needs_library
@needs_asan
def test_no_kernel_leaves_its_memory(tmp_path):
    command = [sys.executable, "-c", BUILD, tmp_path, *WATCHED]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    variables = env.child(
        LD_PRELOAD=" ".join(asan()),
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        OMP_NUM_THREADS="1",
    )

    def child(code: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(tmp_path / "libptm_cpu.so"), *words]
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
        )

    broken = child(BREAK)
    assert "heap-buffer-overflow" in broken.stderr, broken.stderr
    tests = [f"tests/kernels/test_{name}_native.py" for name in WATCHED]
    done = child(RUN, *tests, "-k", "not torchs_rules")
    assert done.returncode == 0 and "[100%]" in done.stdout, done.stdout + done.stderr

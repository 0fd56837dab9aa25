"""The door to the compiled kernels: what is chosen, what is refused, what a fork may do."""

import subprocess
import sys

import pytest
import torch

from ptm.common import env
from ptm.common.errors import KernelError
from ptm.kernels import native, rmsnorm
from tests.support.native import needs_library


def chosen(**switches: str) -> subprocess.CompletedProcess:
    code = (
        "from ptm.kernels import native, rmsnorm\n"
        "from ptm.common.errors import KernelError\n"
        "try: print(native.isa(), native.table())\n"
        "except KernelError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env.child(**switches), capture_output=True, text=True)


@needs_library
def test_the_switches_choose_and_refuse():
    best, table = native.machine()[-1], native.table()
    assert table["add_rmsnorm"] == ("portable" if best == "portable" else "avx512")
    for switches, said in [
        ({"PTM_BACKEND": "", "PTM_CPU_ISA": ""}, f"{best} "),
        ({"PTM_BACKEND": "reference"}, "None {'add_rmsnorm': 'reference'}"),
        ({"PTM_CPU_ISA": "portable"}, "portable {'add_rmsnorm': 'portable'}"),
        ({"PTM_CPU_ISA": "mmx"}, "PTM_CPU_ISA=mmx: this machine and build have portable"),
        ({"PTM_BACKEND": "fast"}, "PTM_BACKEND=fast: is one of auto, reference; unset it"),
    ]:
        done = chosen(**{"PTM_BACKEND": "", "PTM_CPU_ISA": "", **switches})
        assert done.stdout.startswith(said), (switches, done.stdout, done.stderr)


@needs_library
def test_other_types_and_devices_go_to_torch():
    rows = torch.ones(2, 4)
    assert native.serves("add_rmsnorm", rows, rows)
    assert native.serves("add_rmsnorm", rows.bfloat16())
    assert not native.serves("add_rmsnorm", rows.double())
    assert not native.serves("add_rmsnorm", rows, rows.bfloat16())
    assert not native.serves("add_rmsnorm", rows.to("meta"))
    assert not native.serves("no_such_kernel", rows)
    with native.forced(None):
        assert not native.serves("add_rmsnorm", rows)


@needs_library
def test_a_kernel_that_is_not_built_is_named():
    with pytest.raises(KernelError, match="kernel=no_such_kernel: not built"):
        native.call("no_such_kernel")


@needs_library
def test_a_child_of_fork_has_its_own_threads():
    code = """
import os, torch
from ptm.kernels import native, rmsnorm
torch.set_num_threads(3)
x, w = torch.randn(500, 64), torch.ones(64)
before = rmsnorm.rms_norm(x, w, 1e-6)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(rmsnorm.rms_norm(x, w, 1e-6), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(rmsnorm.rms_norm(x, w, 1e-6), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_library
def test_two_callers_at_once_get_their_own_results():
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(3)
    try:
        inputs = [torch.full((400, 96), float(i + 1)) for i in range(8)]
        weight = torch.ones(96)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                for y in pool.map(lambda x: rmsnorm.rms_norm(x, weight, 0.0), inputs):
                    assert float((y - 1).abs().max()) < 1e-6
    finally:
        torch.set_num_threads(1)

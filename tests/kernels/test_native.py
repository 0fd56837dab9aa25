"""The door to the compiled kernels: what is chosen, what is refused, what a fork may do."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ptm.common.errors import KernelError, RecipeError
from ptm.kernels import loss, native, rmsnorm  # noqa: F401 (declares linear_ce)
from tests.support.native import needs_library


@needs_library
@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("isa", ["", *native.machine()])
def test_the_switches_choose(monkeypatch, backend, isa):
    chosen = switched(monkeypatch, PTM_BACKEND=backend, PTM_CPU_ISA=isa)
    expected = isa or native.machine()[-1]
    assert chosen() == (None if backend else expected)
    below = native.ISAS[: native.ISAS.index(expected) + 1]
    best = [isa for isa in below if isa in ("portable", "avx2", "avx512_bf16")][-1]
    assert native.table()["add_rmsnorm"] == ("reference" if backend else best)


@pytest.mark.parametrize("is_slow", [False, True])
def test_slow_products_of_bf16_give_way_where_fp32_has_a_kernel(monkeypatch, is_slow):
    built = ["moe_mlp_avx512_bf16", "moe_mlp_avx512", "rows_avx512_bf16", "rows_avx2"]
    library = types.SimpleNamespace(**{f"ptm_{name}": None for name in built})
    library.ptm_bf16_is_slow = lambda: is_slow
    monkeypatch.setattr(native, "_library", lambda: library)
    backend = native._backend.__wrapped__
    assert backend("moe_mlp", "avx512_bf16", True) == ("avx512" if is_slow else "avx512_bf16")
    assert backend("moe_mlp", "avx512_bf16", False) == "avx512_bf16", "asked for"
    assert backend("rows", "avx512_bf16", True) == "avx512_bf16"
    assert backend("moe_mlp", "avx512", True) == "avx512" and backend("rows", "avx512") == "avx2"
    assert backend("none", "amx", True) is None


@needs_library
def test_which_cpus_have_slow_products_of_bf16():
    words = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    is_slow = "GenuineIntel" in words and "avx512_fp16" in words
    assert native._library().ptm_bf16_is_slow() == is_slow


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"PTM_BACKEND": "fast"}, "PTM_BACKEND=fast: is one of auto, reference; unset it"),
        ({"PTM_CPU_ISA": "mmx"}, "PTM_CPU_ISA=mmx: this machine and build have .*; unset it"),
    ],
)
def test_the_switches_refuse(monkeypatch, switches, said):
    chosen = switched(monkeypatch, **{"PTM_BACKEND": "", **switches})
    with pytest.raises(RecipeError, match=said):
        chosen()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("yes", "PTM_CUDA_KERNELS=yes: is 0 or 1; unset it for 0"),
        ("1", "PTM_CUDA_KERNELS=1: there is no libptm_cuda.so; run csrc/build.py where nvcc is"),
    ],
)
def test_kernels_for_cuda_are_refused_where_they_are_not(monkeypatch, wanted, said):
    switched(monkeypatch, PTM_BACKEND="", PTM_CUDA_KERNELS=wanted)
    monkeypatch.setattr(native, "_cuda_library", lambda: None)
    with pytest.raises(RecipeError, match=said):
        native.table("cuda")


def test_a_cpu_run_refuses_a_misspelt_switch_for_cuda_too(monkeypatch):
    switched(monkeypatch, PTM_BACKEND="", PTM_CUDA_KERNELS="yes")
    with pytest.raises(RecipeError, match="PTM_CUDA_KERNELS=yes: is 0 or 1"):
        native.summary("cpu")


@pytest.mark.parametrize(
    ("switches", "is_on"),
    [
        ({}, False),
        ({"PTM_CUDA_KERNELS": "1"}, True),
        ({"PTM_CUDA_KERNELS": "1", "PTM_BACKEND": "reference"}, False),
    ],
)
def test_kernels_for_cuda_serve_where_they_are_asked_for(monkeypatch, switches, is_on):
    switched(monkeypatch, **{"PTM_BACKEND": "", "PTM_CUDA_KERNELS": "", **switches})
    library = types.SimpleNamespace(ptm_add_rmsnorm_cuda=None)
    monkeypatch.setattr(native, "_cuda_library", lambda: library)
    expected = "cuda" if is_on else "reference"
    assert native.table("cuda")["add_rmsnorm"] == expected
    assert native.summary("cuda").startswith(f"kernels: {expected}: ")
    assert native.table("cuda")["linear_ce"] == "reference" == native.table("mps")["add_rmsnorm"]


def test_without_a_library_torch_serves(monkeypatch):
    switched(monkeypatch, PTM_BACKEND="", PTM_CPU_ISA="")
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(native, "machine", lambda: ())
    assert native.isa() is None and not native.serves("add_rmsnorm", torch.ones(2, 4))
    assert set(native.table().values()) == {"reference"}


def switched(monkeypatch, **switches: str):
    """native.isa under these switches, with nothing remembered from before."""
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "_chosen", native._chosen.__wrapped__)
    monkeypatch.setattr(native, "_wants_cuda", native._wants_cuda.__wrapped__)
    return native.isa


@needs_library
def test_the_head_of_a_run_says_who_serves():
    with native.forced("portable"):
        assert "kernels: portable: " in native.summary("cpu") and "add_rmsnorm" in native.summary(
            "cpu"
        )
    with native.forced(None):
        assert native.summary("cpu") == f"kernels: reference: {', '.join(sorted(native.table()))}"
    assert set(native.table("cuda").values()) == {"reference"}


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

"""The door to the compiled kernels: which one serves, and calls into libptm_cpu.so and
libptm_cuda.so.

csrc/build.py makes the library; docs/kernels.md has the conventions. A kernel `op` is up to five C
functions, ptm_<op>_portable, _avx2, _avx512, _avx512_bf16 and _amx, and the highest that exists
and that this CPU can run serves (but _avx512 in the place of _avx512_bf16 where products of bf16
are slow: csrc/common/machine.cpp). Where there is no library, for other devices, and with
PTM_BACKEND=reference, the plain torch of ptm/kernels/<op>.py serves instead: its public function
asks `serves` and takes one path or the other.

For tensors on a CUDA device the functions are ptm_<op>_cuda of libptm_cuda.so, which run on the
device's current stream. They have been compiled, and run in emulation, but not yet on a device, so
they serve only with PTM_CUDA_KERNELS=1, and torch serves such tensors otherwise.

ctypes gives up Python's lock during a call. Arguments are pointers, 64-bit integers and doubles;
the number of threads, or the stream, comes last.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ptm.common import env
from ptm.common.errors import KernelError, RecipeError, line

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # the order of csrc/common/ptm.h
STATUS = {1: "out of memory", 2: "shapes it cannot do", 3: "timed out", 4: "a system call failed",
          5: "CUDA refused the launch"}  # fmt: skip
LIBRARY = Path(__file__).with_name("libptm_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("libptm_cuda.so")
BACKENDS = ("auto", "reference")
DEVICES = ("CPU", "CUDA")  # dispatch keys of an op whose call goes to either library

_declared: list[str] = []
_forced: list[str | None] = []
_forced_cuda: list[bool] = []


@cache
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(str(LIBRARY)) if LIBRARY.exists() else None


@cache
def _cuda_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(str(CUDA_LIBRARY)) if CUDA_LIBRARY.exists() else None


def _cuda_setting() -> str:
    wanted = env.cuda_kernels()
    if wanted not in ("0", "1"):
        raise RecipeError(line("PTM_CUDA_KERNELS", wanted, "is 0 or 1", "unset it for 0"))
    return wanted


@cache
def _wants_cuda() -> bool:
    wanted = _cuda_setting()
    if wanted == "0" or _backend_setting() == "reference":
        return False
    if _cuda_library() is None:
        what = f"there is no {CUDA_LIBRARY.name}"
        raise RecipeError(line("PTM_CUDA_KERNELS", wanted, what,
                               "run csrc/build.py where nvcc is, or unset it"))  # fmt: skip
    return True


def cuda_is_on() -> bool:
    """Whether kernels serve tensors on CUDA devices.

    Raises: RecipeError, where PTM_CUDA_KERNELS asks for what there is not.
    """
    return _forced_cuda[-1] if _forced_cuda else _wants_cuda()


@contextmanager
def forced_cuda(is_on: bool) -> Iterator[None]:
    """Serve tensors on CUDA devices by kernels, or by torch: for tests and benchmarks."""
    assert not is_on or _cuda_library() is not None, CUDA_LIBRARY
    _forced_cuda.append(is_on)
    try:
        yield
    finally:
        _forced_cuda.pop()


@cache
def machine() -> tuple[str, ...]:
    """The instruction sets that the library may use on this CPU, lowest first; none without one."""
    library = _library()
    return ISAS[: library.ptm_machine() + 1] if library is not None else ()


def _backend_setting() -> str:
    backend = env.kernel_backend()
    if backend not in BACKENDS:
        rule = f"is one of {', '.join(BACKENDS)}"
        raise RecipeError(line("PTM_BACKEND", backend, rule, "unset it for auto"))
    return backend


@cache
def _chosen() -> str | None:
    backend, isa = _backend_setting(), env.cpu_isa()
    if backend == "reference":
        return None
    if isa is None:
        return machine()[-1] if machine() else None
    if isa not in machine():
        has = f"this machine and build have {', '.join(machine()) or 'none'}"
        raise RecipeError(line("PTM_CPU_ISA", isa, has, "unset it for the best there is"))
    return isa


def check_switches() -> None:
    """Raises: RecipeError, for a PTM_* switch of kernels with a value that it does not have."""
    _cuda_setting()
    isa()


def isa() -> str | None:
    """The instruction set in use; None where torch serves everything.

    Raises: RecipeError, where PTM_BACKEND or PTM_CPU_ISA ask for what there is not.
    """
    return _forced[-1] if _forced else _chosen()


@contextmanager
def forced(isa: str | None) -> Iterator[None]:
    """Use another instruction set of this machine, or None for torch: for tests and benchmarks."""
    assert isa is None or isa in machine(), (isa, machine())
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


@cache
def digest() -> str:
    """Which build of the kernels this is, for what was measured with it; empty without one."""
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:12] if LIBRARY.exists() else ""


def declare(*ops: str) -> None:
    """Name the kernels of a module, for `table`."""
    _declared.extend(ops)


def table(device_type: str = "cpu") -> dict[str, str]:
    """What serves each declared op on a device: an instruction set, `cuda`, or `reference`."""
    return {op: backend(op, device_type) or "reference" for op in _declared}


def summary(device_type: str) -> str:
    """One line for the head of a run: `kernels: avx512: rope_qk; reference: ...`.

    Raises: RecipeError for a switch with a value that it does not have, on any device.
    """
    check_switches()
    ops: dict[str, list[str]] = {}
    for op, served_by in table(device_type).items():
        ops.setdefault(served_by, []).append(op)
    order = [name for name in ("cuda", *reversed(ISAS), "reference") if name in ops]
    return "kernels: " + "; ".join(f"{name}: {', '.join(sorted(ops[name]))}" for name in order)


def backend(name: str, device_type: str = "cpu") -> str | None:
    """The instruction set that a kernel of that name is served by, or `cuda`; None if there is
    none."""
    if device_type == "cuda":
        return "cuda" if cuda_is_on() and hasattr(_cuda_library(), f"ptm_{name}_cuda") else None
    return _backend(name, isa(), _takes_any()) if device_type == "cpu" else None


def has(name: str, device_type: str = "cpu") -> bool:
    """Whether a kernel of that name serves on such a device."""
    return backend(name, device_type) is not None


# torch.compile takes the answer as it is and does not look inside. This is all that
# torch.compiler.assume_constant_result does, without its import of the compiler: 0.9 s.
has._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(name: str, *rows: Tensor) -> bool:
    """Whether a kernel takes these rows: on one device, all fp32 or all bf16, dense."""
    kind, device = rows[0].dtype, rows[0].device
    return (
        (kind is torch.float32 or kind is torch.bfloat16)
        and all(t.dtype is kind and t.device == device for t in rows)
        and all(t.layout is torch.strided for t in rows)
        and has(name, device.type)
    )


@cache
def _is_asked_for() -> bool:
    return env.cpu_isa() is not None


def _takes_any() -> bool:
    """Whether nobody asked for an instruction set."""
    return not _forced and not _is_asked_for()


@cache
def _backend(name: str, highest: str | None, takes_any: bool = False) -> str | None:
    if highest is None:
        return None
    library = _library()
    assert library is not None
    usable = ISAS[: ISAS.index(highest) + 1]
    built = [i for i in reversed(usable) if hasattr(library, f"ptm_{name}_{i}")]
    if takes_any and built[:2] == ["avx512_bf16", "avx512"] and library.ptm_bf16_is_slow():
        return "avx512"
    return built[0] if built else None


@cache
def _function(name: str, highest: str | None, takes_any: bool):
    backend = _backend(name, highest, takes_any)
    if backend is None:
        raise KernelError(line("kernel", name, f"not built for {highest}", "run csrc/build.py"))
    return getattr(_library(), f"ptm_{name}_{backend}")


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Run a kernel. Tensors go as pointers (None as null), ints as int64, floats as double.

    Where the first tensor is on a CUDA device all are, and the kernel is put on its current stream.
    Raises: KernelError, where a tensor is not a contiguous one in memory or the kernel fails.
    """
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), _CPU)
    if device.type == "cuda":
        status = _call_cuda(name, device, args)
    else:
        threads = ctypes.c_int64(torch.get_num_threads())
        status = _function(name, isa(), _takes_any())(*_converted(name, args, _CPU), threads)
    if status:
        what = STATUS.get(status, f"status {status}")
        raise KernelError(line("kernel", name, what, f"called with {_shapes(args)}"))


def _call_cuda(name: str, device: torch.device, args: Sequence) -> int:
    if backend(name, "cuda") is None:
        raise KernelError(line("kernel", name, "not served on CUDA", "set PTM_CUDA_KERNELS=1"))
    function = getattr(_cuda_library(), f"ptm_{name}_cuda")
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        return function(*_converted(name, args, device), stream)


_CPU = torch.device("cpu")


def _converted(name: str, args: Sequence[Tensor | int | float | None], on: torch.device) -> list:
    out: list = []
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            if arg.device != on or not arg.is_contiguous():
                what = f"argument {i} of shape {tuple(arg.shape)}, strides {arg.stride()}"
                rule = f"{what} on {arg.device} is not contiguous in memory of {on}"
                raise KernelError(line("kernel", name, rule, "pass it .contiguous()"))
            out.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            out.append(ctypes.c_double(arg))
        else:
            out.append(ctypes.c_void_p(None) if arg is None else ctypes.c_int64(arg))
    return out


def _shapes(args: Sequence[Tensor | int | float | None]) -> str:
    return ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in args)

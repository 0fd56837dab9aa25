"""Build libptm_cpu.so (and libptm_cuda.so where there is nvcc) beside ptm/kernels/native.py.

    python csrc/build.py            # only what changed; `make test` and `make train` run it first

`pip install` runs it too (setup.py). Each csrc/*/cpu*.cpp is compiled once per instruction set
(csrc/common/ptm.h says how they are told apart), every other csrc/*/*.cpp once, csrc/*/cuda*.cu for
sm_80 and sm_90a. No header of torch or Python is used, so one library serves any version of both.

CXX names the compiler (g++, then clang++, else); without one nothing is built and torch serves
every op. PTM_CUDA is 0 (no), 1 (must) or auto (if there is nvcc, and it can). Objects are kept in
build/csrc under the hash of their source, headers and flags.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
X86 = platform.machine() in ("x86_64", "AMD64")

FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes",
    "-Wno-uninitialized",  # GCC 12 warns about its own intrinsics
    "-pthread",
]  # fmt: skip
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"]
ISAS: dict[str, list[str]] = {
    "portable": ["-DPTM_ISA=0", *(["-march=x86-64-v2"] if X86 else [])],
    "avx2": ["-DPTM_ISA=1", "-march=x86-64-v3"],
    "avx512": ["-DPTM_ISA=2", *AVX512],
    "avx512_bf16": ["-DPTM_ISA=3", *BF16],
    "amx": ["-DPTM_ISA=4", *BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
LINK = ["-shared", "-pthread", "-static-libgcc", "-static-libstdc++", "-Wl,-z,defs",
        "-Wl,--exclude-libs,ALL"]  # fmt: skip
CUDA_FLAGS = [
    "-std=c++17", "-O3", "--cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
]  # fmt: skip


def build(target: Path, *, sanitize: str = "", ops: Sequence[str] = ()) -> list[Path]:
    """Build the libraries into the folder `target`; returns them, none where there is no compiler.

    ops: folders to take, of all; watched code of the large products takes minutes to compile.
    Raises: SystemExit with the compiler's words where a source does not compile.
    """
    compiler = _compiler()
    if compiler is None:
        _say("no C++ compiler (CXX, g++, clang++): installed without kernels, torch serves all ops")
        return []
    extra = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []
    objects = ROOT / "build" / "csrc"
    objects.mkdir(parents=True, exist_ok=True)
    jobs = []
    for isa, flags in ISAS.items():
        if isa != "portable" and not (X86 and _accepts(compiler, flags)):
            if X86:
                _say(f"{compiler[0]} does not know {isa}: built without")
            continue
        for source in sorted(CSRC.glob("*/*.cpp")):
            if isa in _isas_of(source) and (not ops or source.parent.name in ops):
                # Its own names: the linker merges inline functions and templates of one name, also
                # where their code differs (another instruction set, another op).
                names = f"-DPTM_NAMESPACE=ptm_{source.parent.name}_{source.stem}_{isa}"
                jobs.append((source, isa, [*compiler, *FLAGS, *flags, names, *extra]))
    libraries = [_link(jobs, [*compiler, *LINK, *extra], target / "libptm_cpu.so", objects)]
    nvcc = _nvcc()
    if nvcc and not sanitize:
        library = target / "libptm_cuda.so"
        link = [nvcc, "-shared", "--cudart=static"]
        try:
            libraries.append(_link(cuda_jobs(nvcc), link, library, objects))
        except SystemExit as failed:
            if os.environ.get("PTM_CUDA") == "1":
                raise
            # An nvcc that is too old, or does not know this g++, must not keep ptm from being
            # installed; and a library from before does not stay beside newer Python.
            library.unlink(missing_ok=True)
            last = (str(failed).strip().splitlines() or [""])[-1]
            _say(f"nvcc fails, so no kernels for CUDA (PTM_CUDA=1 shows all): {last}")
    return libraries


def cuda_jobs(nvcc: str) -> list:
    """Sources for CUDA with the commands that compile them."""
    jobs = []
    for source in sorted(CSRC.glob("*/cuda*.cu")):
        names = f"-DPTM_NAMESPACE=ptm_of_{source.parent.name}_{source.stem}"
        jobs.append((source, "cuda", [nvcc, *CUDA_FLAGS, names]))
    return jobs


def _isas_of(source: Path) -> Sequence[str]:
    if not source.name.startswith("cpu"):
        return ["portable"]
    named = re.match(r"// isa: (.*)", source.read_text())
    return named[1].split() if named else list(ISAS)


def _link(jobs, link: list[str], library: Path, objects: Path) -> Path:
    named = [(objects / f"{_key(job)}.o", job) for job in jobs]
    missing = [(path, job) for path, job in named if not path.exists()]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda one: _run([*one[1][2], "-c", str(one[1][0])], one[0]), missing))
    key = _hash(*link, *(path.name for path, _ in named))
    stamp = objects / f"{library.stem}-{_hash(str(library))}.key"
    if library.exists() and stamp.exists() and stamp.read_text() == key:
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    _run([*link, *(str(path) for path, _ in named)], library)
    stamp.write_text(key)
    _say(f"{library.name}: {len(missing)} of {len(named)} objects compiled")
    return library


def _key(job) -> str:
    """A name for the object of a source: where it is from, and a hash of all that it is made of."""
    source, isa, command = job
    texts, queue, seen = [], [source], set()
    while queue:
        file = queue.pop()
        if file in seen or not file.exists():
            continue
        seen.add(file)
        texts.append(file.read_text())
        found = re.findall(r'^\s*#\s*include "([^"]+)"', texts[-1], flags=re.MULTILINE)
        queue += [(file.parent / name).resolve() for name in found]
    return f"{source.parent.name}-{source.stem}-{isa}-{_hash(*command, *texts)}"


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _run(command: list[str], out: Path) -> None:
    """Run a compiler that writes `out`; a half-written file is never seen under that name."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        part.unlink(missing_ok=True)
        raise SystemExit(f"csrc/build.py: {' '.join(command)}\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    os.replace(part, out)


def _compiler() -> list[str] | None:
    named = os.environ.get("CXX", "").split()
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return [shutil.which(command[0]) or "", *command[1:]]
    return None


def _accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def _nvcc() -> str | None:
    wanted = os.environ.get("PTM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PTM_CUDA={wanted}: is auto, 0 or 1; unset it for auto")
    nvcc = shutil.which("nvcc") if wanted != "0" else None
    if wanted == "1" and nvcc is None:
        raise SystemExit("PTM_CUDA=1: there is no nvcc; install the CUDA toolkit or unset PTM_CUDA")
    return nvcc


def _say(text: str) -> None:
    print(f"csrc/build.py: {text}", flush=True)


if __name__ == "__main__":
    build(ROOT / "ptm" / "kernels")

"""The CUDA kernels of csrc/ in the place of libptm_cpu.so: compiled by g++, their threads run as
fibers (csrc/common/emulated.h).

The library that `build_emulated` makes has every op of csrc/*/cuda*.cu under the name of the
portable one, so the tests of the compiled kernels run with it as they are (`run_tests`), in a
process of their own. What such a test takes for a number of threads is here the order in which
threads and blocks take their turns.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from ptm.common import env
from tests.support.asan import asan

ROOT = Path(__file__).resolve().parents[2]
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")

FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
         "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-U_FORTIFY_SOURCE",
         "-DPTM_ISA=0"]  # fmt: skip
# Where accesses are watched the compiler warns of more, and not rightly.
SANITIZE = "-fsanitize=address,alignment"
WATCHED = [SANITIZE, "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer", "-Wno-error"]
RUN = """
import sys
from pathlib import Path
from ptm.kernels import native
native.LIBRARY = Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-rA", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
# The one function of csrc/common that such a library needs: there is no other instruction set.
MACHINE = 'extern "C" __attribute__((visibility("default"))) int ptm_machine() { return 0; }\n'


@cache
def build_script() -> ModuleType:
    """csrc/build.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("ptm_csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*/cuda*.cu"))


def compile_object(source: Path, target: Path, *more: str) -> None:
    """One source for the emulation. Raises: CalledProcessError, also for a warning."""
    name = f"-DPTM_NAMESPACE=ptm_emulated_of_{source.parent.name}_{source.stem}"
    command = ["g++", *FLAGS, *more, name, "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=600)


def build_emulated(folder: Path, sources: list[Path], *, is_watched: bool = False) -> Path:
    """The library of these sources, in the folder; is_watched: for accesses out of bounds
    or at an address that is no multiple of their size."""
    watched = WATCHED if is_watched else []
    main = folder / "machine.cpp"
    main.write_text(MACHINE)
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in (main, *sources)]
    for source, target in zip((main, *sources), objects, strict=True):
        compile_object(source, target, *watched)
    library = folder / "libptm_emulated.so"
    undefined = [SANITIZE] if is_watched else ["-Wl,-z,defs"]
    link = ["g++", "-shared", *map(str, objects), *undefined, "-o", str(library)]
    subprocess.run(link, check=True, timeout=600)
    return library


def run_tests(library: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """pytest on these files and with these options, with the library in libptm_cpu.so's place."""
    return run(library, RUN, *words)


def run(
    library: Path, code: str, *words: str, is_watched: bool = False
) -> subprocess.CompletedProcess[str]:
    """Python code that gets the library as its first argument."""
    variables = env.child(OMP_NUM_THREADS="1", PTM_BACKEND="auto", PTM_CPU_ISA="portable")
    if is_watched:
        variables |= {"LD_PRELOAD": " ".join(asan()), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", code, str(library), *words]
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )

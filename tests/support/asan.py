"""Libraries whose memory the compiler watches, and what a Python that loads one needs."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def asan() -> list[str]:
    """Libraries to load first, as Python itself is not built for the sanitizer: its own, and that
    of C++, or it does not find what throws where torch passes on a refusal. None without g++."""
    found = []
    for name in ("libasan.so", "libstdc++.so") if shutil.which("g++") else ():
        command = ["g++", f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return found if found and all(Path(path).is_absolute() for path in found) else []


needs_asan = pytest.mark.skipif(not asan(), reason="no g++ with libasan")

"""Runs a command as its own process and says how it ended: code, output, seconds, peak memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    wall_s: float
    peak_bytes: int


Variables = Mapping[str, str | None]


def variables(changed: Variables) -> dict[str, str]:
    """This process's environment with this checkout's ptm and `changed`, where None removes."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
    return {name: value for name, value in merged.items() if value is not None}


def run_process(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    env: Variables | None = None,
    timeout_s: float = 180.0,
) -> Ended:
    """Run `command` with this checkout's ptm; killed with its children after `timeout_s` (-9)."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=variables(env or {}),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        peak_bytes = 0
        while True:
            peak_bytes = max(peak_bytes, most_resident_bytes(process.pid))
            pid, status, _ = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > timeout_s:
                os.killpg(process.pid, 9)
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    wall_s = time.monotonic() - started
    return Ended(process.returncode, texts[0], texts[1], wall_s, peak_bytes)


def most_resident_bytes(pid: int) -> int:
    """What a process has held at most since it began its program; 0 once it has ended.

    Not ru_maxrss, which starts from the size of the process that forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def ptm(*words: str | Path, cwd: Path, env: Variables | None = None) -> Ended:
    """`ptm VERB ...` as its own process."""
    return run_process([sys.executable, "-m", "ptm", *words], cwd=cwd, env=env)

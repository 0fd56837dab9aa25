"""Whole training runs of a bench, through the command line, in processes of one thread."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptm.common import env
from ptm.common.errors import PtmError, line


def train_run(folder: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Train, or finish, the run in `folder`; returns its steps. Raises PtmError when it fails."""
    fixed = [f"run.dir={folder}", "log.wandb=off", "log.progress=off"]
    command = [sys.executable, "-m", "ptm", "train", *words, *fixed]
    one_thread = env.child(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        rule = f"exit code {done.returncode}: {' '.join(last)}"
        raise PtmError(line("run", folder, rule, "the same command goes on from where it stopped"))
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

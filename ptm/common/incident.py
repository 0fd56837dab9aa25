"""Where the full trace of a failure goes, so that the screen shows one line.

The wiring says where the run lives once its folder exists; before that, and for verbs without a
run, traces go to the temporary folder. Nothing is written unless something fails. Traces hold
source lines, never values of variables.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from ptm.common import env

_run_dir: Path | None = None


def set_run_dir(folder: Path | None) -> None:
    """From now on traces go to FOLDER/incidents/."""
    global _run_dir
    _run_dir = folder


def write_trace(error: BaseException) -> str:
    """Write the trace of `error` with its causes; returns the path, or why there is none."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-rank{env.ranks().rank}-{os.getpid()}.txt"
    for folder in (_run_dir / "incidents" if _run_dir else None, Path(tempfile.gettempdir())):
        if folder is None:
            continue
        try:
            folder.mkdir(exist_ok=True)  # not its parents: a failing run makes no run folder
            path = folder / (name if folder.name == "incidents" else f"ptm-{name}")
            # O_EXCL: in a shared temporary folder a link with this name is not followed
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text.encode("utf-8", "backslashreplace").decode())
            return str(path)
        except OSError:
            continue
    return "nowhere (neither the run folder nor the temporary folder can be written)"

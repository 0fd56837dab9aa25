"""What tests ask a child process to do: see ptm/data/child.py."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from ptm.common.errors import DataError


def handle(request: dict[str, Any], report: Callable[[Any], None]) -> Any:
    match request["do"]:
        case "twice":
            print("what a library prints")
            report("half way")
            return 2 * request["n"]
        case "data":
            raise DataError("no good")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "memory":
            return len(b"x" * (2 << 30))
        case "spin":
            while True:
                pass
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)

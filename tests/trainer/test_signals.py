"""Signals where nothing has to be finished: they end the block, whatever runs in it."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import contextlib, hashlib, os, signal
from ptm import cli
from ptm.trainer import signals
from ptm.trainer.signals import StopRequest, leaving_at_once, stop_requests
signals.PATIENCE_S = 0.2
def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
def job():
    stop = StopRequest()
    with leaving_at_once(stop, "stopped", "go on"):
"""
TAIL = """
cli._parse = lambda words: job
cli.main([])
"""


def ended(body: str) -> subprocess.CompletedProcess[str]:
    lines = "".join(f"        {row}\n" for row in body.splitlines())
    return subprocess.run(
        [sys.executable, "-c", HEAD + lines + TAIL],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("try: ask()\nexcept Exception: print('swallowed')", id="in what swallows"),
        pytest.param("try: ask()\nfinally: raise OSError('closed')", id="a failure behind it"),
        pytest.param("try: ask()\nfinally: ask(signal.SIGHUP); print('left')", id="a second one"),
        pytest.param("ask(signal.SIGINT)", id="Ctrl-C"),
        pytest.param(
            "with stop_requests(StopRequest()): pass\nask()", id="behind a loop that has ended"
        ),
        pytest.param(
            "import threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.2), ask()), daemon=True).start()\n"
            "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
            id="in C that does not come back",
        ),
    ],
)
def test_a_signal_is_one_line_and_the_code_of_stopped(body: str) -> None:
    done = ended(body)
    assert re.fullmatch(r"signal=SIG(TERM|INT): stopped; go on\n", done.stderr)
    assert done.returncode == 75 and "swallowed" not in done.stdout


def test_in_the_loop_it_is_noted_and_the_loop_s_own_failure_is_told() -> None:
    done = ended(
        "from ptm.common.errors import DivergedError\n"
        "with stop_requests(stop): ask(); raise DivergedError('at step 3')"
    )
    assert (done.returncode, done.stderr) == (76, "at step 3\n")


def test_a_second_ctrl_c_ends_what_closes() -> None:
    done = ended("try: ask(signal.SIGINT)\nfinally: ask(signal.SIGINT); print('left')")
    assert done.returncode == 130 and done.stderr.startswith("signal=SIGINT: interrupted")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

"""A signal to ptm export: one line that says how to go on, and the layers that are done."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import runs


@pytest.mark.slow
def test_a_signal_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    text, cache, run = runs.corpus(tmp_path), tmp_path / "cache", tmp_path / "run"
    runs.finish(runs.launch(0, runs.words(run, text, train__steps=5), cache))
    out = tmp_path / "out"
    words = [str(run), "group=32", "rows=64", f"out={out}"]
    with subprocess.Popen(
        runs.command(0, words, "export"), env=runs.environment(cache), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        while not (out.with_name("out.partial") / "settings.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    rule = "stopped, layers that are done are kept; the same command goes on behind them"
    assert (process.returncode, err) == (75, f"signal=SIGTERM: {rule}\n")
    assert out.with_name("out.partial").is_dir() and not out.exists()
    runs.finish(runs.launch(0, words, cache, verb="export"))
    assert (out / "config.json").is_file()

"""Rewards in their process: values, failures that cost one row, and no network."""

import os
import socket
import time
from pathlib import Path

import pytest

from ptm.common.errors import DataError, PtmError, RecipeError
from ptm.data import rewards
from ptm.data.rewards import Rewarder

FUNCTIONS = """
import socket, time, os
def score(question, answer, text):
    if text == "hang":
        while True: pass
    if text == "sleep": time.sleep(60)
    if text == "raise": raise ValueError("no")
    if text == "nan": return float("nan")
    if text == "text": return "much"
    if text == "die": os._exit(3)
    if text == "stop": os.kill(os.getpid(), 19)  # SIGSTOP
    if text == "dial": socket.create_connection(("127.0.0.1", int(answer)), timeout=1)
    if text == "print": print("{}")
    if text == "huge": return 1e308
    if text == "read": import sys; return float(sys.stdin.read() == "")
    if text == "fork": os.fork()
    if text == "leave":
        pid = os.fork()
        if not pid: time.sleep(60)
        return pid
    return len(text) / 10
def two(question, text): return 1.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_built_in_rewards():
    with Rewarder("exact", timeout_s=5) as rewarder:
        rows = [("q", "5", " 5\n"), ("q", "5", "15"), ("q", "", "")]
        assert rewarder.score(rows).rewards == [1.0, 0.0, 1.0]
        assert rewarder.score([]).rewards == []
    with Rewarder("contains", timeout_s=5) as rewarder:
        assert rewarder.score([("q", "5", "15"), ("q", "5", "6")]).rewards == [1.0, 0.0]


def test_a_failure_costs_its_row_and_is_counted(file):
    with Rewarder(f"{file}:score", timeout_s=0.3) as rewarder:
        texts = ["abc", "raise", "hang", "ab", "sleep", "nan", "text", "die", "print", "abcd"]
        found = rewarder.score([("q", "a", text) for text in texts])
        assert found.rewards == [0.3, 0, 0, 0.2, 0, 0, 0, 0, 0.5, 0.4]
        assert (found.raised, found.hung) == (4, 2) and "ValueError: no" in found.first_error
        assert rewarder.score([("q", "a", "a")]).rewards == [0.1]


def test_one_that_stops_its_process_is_late_or_goes_on(file: Path) -> None:
    rows = [("q", "a", "stop"), ("q", "a", "ab")]
    with Rewarder(f"{file}:score", timeout_s=0.3) as rewarder:  # its alarm is heard when it goes on
        assert rewarder.score(rows) == ([0.0, 0.2], 0, 1, "the reward took longer than 0.3 s")
    with Rewarder(f"{file}:score", timeout_s=20) as rewarder:
        assert rewarder.score(rows) == ([0.4, 0.2], 0, 0, "")


def test_asked_to_stop_it_scores_no_further_answer(file: Path) -> None:
    with Rewarder(f"{file}:score", timeout_s=20) as rewarder:
        asked = iter([False, False, True])
        rows = [("q", "a", text) for text in ["abc", "ab", "hang", "hang"]]
        found = rewarder.score(rows, lambda: next(asked, True))
        assert found == ([0.3, 0.2, 0.0, 0.0], 0, 0, "")
        assert rewarder.score(rows[:1]).rewards == [0.3]


def test_a_reward_has_no_network(file):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with Rewarder(f"{file}:score", timeout_s=5) as rewarder:
            found = rewarder.score([("q", port, "dial")])
        assert found.rewards == [0.0] and "no network" in found.first_error


def test_what_a_reward_starts_does_not_answer_in_its_place_and_ends_with_it(file: Path) -> None:
    with Rewarder(f"{file}:score", timeout_s=5) as rewarder:
        found = rewarder.score([("q", "a", text) for text in ["fork", "ab", "huge", "read"]])
        assert found.rewards == [0.4, 0.2, 0.0, 1.0] and found.raised == 1
        assert "1e+308, not a number of 1e+09 at most" in found.first_error
        pid = int(rewarder.score([("q", "a", "leave")]).rewards[0])
        os.kill(pid, 0)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in status(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives on")


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def test_what_it_prints_goes_to_its_log(file: Path, tmp_path: Path, capfd) -> None:
    log = tmp_path / "reward.log"
    with Rewarder(f"{file}:score", timeout_s=5, log=log) as rewarder:
        assert rewarder.score([("q", "a", "print")]).rewards == [0.5]
    assert log.read_text() == "{}\n" and capfd.readouterr() == ("", "")


def test_a_reward_that_hangs_again_and_again_is_asked_no_more(file, monkeypatch) -> None:
    monkeypatch.setattr(rewards, "MOST_LOST", 2)
    with Rewarder(f"{file}:score", timeout_s=0.2) as rewarder:
        found = rewarder.score([("q", "a", text) for text in ["ab", *["hang"] * 40]])
        assert found.rewards == [0.2] + 40 * [0.0] and (found.raised, found.hung) == (0, 40)


def test_one_that_ends_its_process_is_one_line_and_soon_asked_no_more(file: Path) -> None:
    with Rewarder(f"{file}:score", timeout_s=5) as rewarder:
        found = rewarder.score([("q", "a", text) for text in ["ab", *["die"] * 500]])
    assert found.first_error == "the reward crashed its process (exit 3)"
    assert found.rewards == [0.2] + 500 * [0.0] and (found.raised, found.hung) == (500, 0)


def test_what_is_raised_is_told_with_its_line_on_one(tmp_path: Path, monkeypatch) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import json\ndef deep(text): return json.loads(text)\n"
        "def f(question, answer, text):\n"
        "    if text == 'two': raise ValueError('this\\n  and that')\n"
        "    return deep(text)\n"
    )
    with Rewarder(f"{bad}:f", timeout_s=5) as rewarder:
        told = [rewarder.score([("q", "a", text)]).first_error for text in ("two", "{", "0")]
    assert told[0] == "the reward raised ValueError: this and that (bad.py:4)"
    assert told[1].startswith("the reward raised JSONDecodeError: ")
    assert told[1].endswith(" (bad.py:2)") and not told[2]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Rewarder("../bad.py:f", timeout_s=5) as rewarder:
        assert rewarder.score([("q", "a", "two")]).first_error == told[0]
    bad.write_text("a = 1\nb = a / 0\n")
    with pytest.raises(DataError, match=r"imported: ZeroDivisionError: .* \(bad\.py:2\); mend"):
        Rewarder(f"{bad}:f", timeout_s=5)


def test_an_import_that_ends_its_process_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    for code, rule in (
        ("os._exit(5)", r"crashed its process \(exit 5\)"),
        ("os.kill(os.getpid(), 9)", "was killed, most likely for want of memory"),
    ):
        bad.write_text(f"import os\n{code}\n")
        with pytest.raises(
            PtmError, match=rf"^grpo\.reward=\S+: its import {rule}; mend the file$"
        ):
            Rewarder(f"{bad}:f", timeout_s=5)


def test_other_arguments_and_a_file_that_hangs_are_one_line(file, tmp_path, monkeypatch) -> None:
    with pytest.raises(RecipeError, match=r"two: is called as two\(question, answer, text\): too "):
        Rewarder(f"{file}:two", timeout_s=5)
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(60)\ndef f(question, answer, text): return 0\n")
    monkeypatch.setattr(rewards, "IMPORT_S", 1.0)
    with pytest.raises(
        DataError, match=r"^grpo\.reward=.*slow\.py:f: its import took too long \(1 s\); mend"
    ):
        Rewarder(f"{slow}:f", timeout_s=5)


@pytest.mark.parametrize("name", ["nothing", "no/such.py:f", "FILE:missing", "FILE:not a name"])
def test_a_wrong_name_is_one_line(name, file):
    with pytest.raises(RecipeError, match=r"^grpo\.reward=.*; give ") as caught:
        Rewarder(name.replace("FILE", str(file)), timeout_s=5)
    assert "\n" not in str(caught.value)
    assert ("there is no file no/such.py" in str(caught.value)) == name.startswith("no/")

"""Rewards in their process: values, failures that cost one row, and no network."""

import socket

import pytest

from ptm.common.errors import RecipeError
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
    if text == "dial": socket.create_connection(("127.0.0.1", int(answer)), timeout=1)
    if text == "print": print("{}")
    return len(text) / 10
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


def test_a_reward_has_no_network(file):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with Rewarder(f"{file}:score", timeout_s=5) as rewarder:
            found = rewarder.score([("q", port, "dial")])
        assert found.rewards == [0.0] and "no network" in found.first_error


@pytest.mark.parametrize("name", ["nothing", "no/such.py:f", "FILE:missing", "FILE:not a name"])
def test_a_wrong_name_is_one_line(name, file):
    with pytest.raises(RecipeError, match=r"^grpo\.reward=.*; give ") as caught:
        Rewarder(name.replace("FILE", str(file)), timeout_s=5)
    assert "\n" not in str(caught.value)
    assert ("there is no file no/such.py" in str(caught.value)) == name.startswith("no/")

"""The protocol of shared memory under ThreadSanitizer, with threads as ranks; and with one wait or
one release taken out, which must be seen, also where the bytes come out right on this CPU."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUGS = {
    0: "as it is",
    1: "writes without room",
    2: "moves the head without release",
    3: "moves the tail before it has read",
    4: "looks at the head without acquire",
    5: "moves the tail without release",
    6: "writes a window that others may still read",
}
# The sanitizer needs addresses where it expects them: GCC 12's knows less random ones.
FIXED = ["setarch", platform.machine(), "-R"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function from a bug's number to the test program that has it."""
    if not shutil.which("g++") or not shutil.which("setarch"):
        pytest.skip("no g++, or no setarch")
    folder = tmp_path_factory.mktemp("shm")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}")

    def compile(source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
        command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", *flags]
        return subprocess.run(
            [*command, str(source), "-o", str(out)], capture_output=True, text=True
        )

    probe = compile(empty, folder / "empty")
    if probe.returncode or subprocess.run([*FIXED, folder / "empty"]).returncode:
        pytest.skip("no ThreadSanitizer here")

    def build(bug: int) -> Path:
        out = folder / f"bug-{bug}"
        done = compile(HERE / "shm_protocol.cpp", out, f"-DPTM_SHM_BUG={bug}")
        assert done.returncode == 0, done.stderr
        return out

    return build


def _run(program: Path, ranks: int, rounds: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*FIXED, str(program), str(ranks), str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_nothing_races(built):
    program = built(0)
    for ranks in (2, 3, 4):
        done = _run(program, ranks, rounds=40)
        assert done.returncode == 0 and "0 wrong bytes" in done.stdout, done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bug", [n for n in BUGS if n], ids=BUGS.get)
def test_an_error_in_the_protocol_is_seen(built, bug):
    done = _run(built(bug), ranks=3, rounds=40)
    assert "data race" in done.stderr, done.stdout + done.stderr

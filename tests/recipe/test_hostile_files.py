"""Recipe files made to harm: refused in one line, two seconds and 200 MB, and nothing is run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ptm.common.errors import RecipeError
from ptm.recipe import load_recipe
from tests.support.processes import ptm

SECRET = "hunter2-do-not-print"
MOST_S, MOST_BYTES = 2.0, 200e6


def text(content: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(content) and None


def two_files_in_a_circle(file: Path) -> None:
    file.write_text("base: other.yaml\n")
    file.with_name("other.yaml").write_text(f"base: {file.name}\n")


def a_link_out_of_the_folder(file: Path) -> None:
    secret = file.parent.parent / "outside.yaml"
    secret.write_text("train: {lr: 1e-3}\n")
    file.with_name("inside.yaml").symlink_to(secret)
    file.write_text("base: inside.yaml\n")


def a_base_outside(file: Path) -> None:
    (file.parent.parent / "outside.yaml").write_text("train: {lr: 1e-3}\n")
    file.write_text("base: ../outside.yaml\n")


def a_chain_of_twenty(file: Path) -> None:
    file.write_text("base: 0.yaml\n")
    for i in range(20):
        file.with_name(f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")


def fifty_megabytes(file: Path) -> None:
    file.write_text("train: {lr: 1e-3} # " + "x" * 50_000_000)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)

FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "object": (
        text("train: !!python/object/apply:os.system ['touch canary']\n"),
        "tags are not allowed",
    ),
    "object key": (text("? !!python/name:os.system\n: 1\n"), "tags are not allowed"),
    "anchors": (text(BOMB), "anchors and aliases are not allowed"),
    "merge": (text("train: &t {lr: 1}\noptim: {<<: *t}\n"), "anchors and aliases are not allowed"),
    "50 MB": (fifty_megabytes, "must be at most 1,048,576 bytes"),
    "1 MB of list": (text("train: [" + "1," * 500_000 + "]"), "over 20,000 values"),
    "1 MB of brackets": (text("[" * 1_000_000), "over 20 levels deep"),
    "1 MB of nesting": (text("? " * 500_000), "over 20 levels deep"),
    "1 MB of one key": (text("k" * 1_000_000 + ": 1"), "is not YAML"),
    "1 MB of one value": (text("recipe: " + "k" * 1_000_000), "at most 4096 characters"),
    "1 MB of escapes": (text('recipe: "' + "\\x41" * 250_000 + '"'), "at most 4096 characters"),
    "duplicate": (text("train:\n  lr: 1e-3\n  lr: 1e-4\n"), "the same key is on line 2"),
    "duplicate section": (text("train: {lr: 1}\ntrain: {lr: 2}\n"), "the same key is on line 1"),
    "duplicate by dot": (text("train: {lr: 1}\ntrain.lr: 2\n"), "is already given at"),
    "environment": (text("run: {name: '${oc.env:SECRET}'}\n"), "a recipe reads no variables"),
    "environment in a base": (text("base: ${oc.env:SECRET}\n"), "a recipe reads no variables"),
    "base outside": (a_base_outside, "is outside of the folder"),
    "base by link": (a_link_out_of_the_folder, "is outside of the folder"),
    "base absolute": (text("base: /etc/hosts.yaml\n"), "is outside of the folder"),
    "base passwd": (text("base: /etc/passwd\n"), "neither a shipped recipe"),
    "base missing": (text("base: gone.yaml\n"), "no such file"),
    "base of itself": (lambda f: f.write_text(f"base: {f.name}\n"), "builds on itself"),
    "base circle": (two_files_in_a_circle, "builds on itself"),
    "base chain": (a_chain_of_twenty, "more than 8 recipes away"),
    "base list": (text("base: [m32]\n"), "must be text, not a list"),
    "base long": (text(f"base: {'a' * 3000}.yaml\n"), "no such file"),
    "two documents": (text("train: {lr: 1e-3}\n---\ntrain: {lr: 1e-4}\n"), "is one document"),
    "binary": (lambda f: f.write_bytes(os.urandom(4096) + b"\xff\xfe"), "must be UTF-8 text"),
    "NUL": (lambda f: f.write_bytes(b"train: {lr: 1e-3}\0"), "YAML does not allow"),
    "tab": (text("train:\n\tlr: 1\n"), "is not YAML"),
    "list": (text("- train\n"), "must hold `key: value` lines"),
    "scalar": (text("train\n"), "must hold `key: value` lines"),
    "folder": (Path.mkdir, "is not a file"),
    "pipe": (os.mkfifo, "is not a file"),
    "device": (lambda f: f.symlink_to("/dev/zero"), "is not a file"),
    "missing": (lambda f: None, "no such file"),
    "scales list": (text("scales: [mini]\n"), "must be a mapping of full, mini, debug"),
    "scale unknown": (text("scales: {mni: {train: {lr: 1}}}\n"), "did you mean mini?"),
    "scale in scale": (text("scales: {mini: {model: {scale: full}}}\n"), "cannot choose this"),
    "key in scale": (text("scales:\n  mini:\n    train: {lrr: 1}\n"), "did you mean train.lr?"),
    "section null": (text("train:\n"), "is a section, not a value"),
    "null": (text("train: {lr: null}\n"), "not null"),
    "mapping for a value": (text("train: {lr: {a: 1}}\n"), "not a mapping"),
}


@pytest.fixture
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    file = folder / "hostile.yaml"
    FILES[request.param][0](file)
    return file


@pytest.mark.parametrize("hostile", FILES, indirect=True)
def test_refused_in_one_line(hostile: Path, request: pytest.FixtureRequest) -> None:
    rule = FILES[request.node.callspec.params["hostile"]][1]
    with pytest.raises(RecipeError) as e:
        load_recipe([f"recipe={hostile}"])
    message = str(e.value)
    assert rule in message
    assert re.fullmatch(r"[^\n]*=[^\n]*: [^\n]+; [^\n]+", message) and len(message) < 600


PROCESSES = [
    "object", "anchors", "50 MB", "1 MB of list", "1 MB of brackets", "1 MB of one value",
    "environment", "base outside", "base circle", "pipe",
]  # fmt: skip


@pytest.mark.parametrize("hostile", PROCESSES, indirect=True)
def test_within_time_and_memory(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    ended = ptm("train", f"recipe={hostile}", cwd=here, env={"SECRET": SECRET, "TMPDIR": str(here)})
    assert ended.code == 2 and ended.out == ""
    assert ended.err.count("\n") == 1 and "Traceback" not in ended.err
    assert SECRET not in ended.err
    assert list(here.iterdir()) == []  # no canary, no run folder, no trace
    assert ended.peak_bytes < MOST_BYTES
    assert ended.wall_s < MOST_S


def test_the_measurement_sees_time_and_memory(tmp_path: Path) -> None:
    from tests.support.processes import run_process

    script = "import time; x = bytearray(250_000_000); time.sleep(0.3)"
    ended = run_process(["python3", "-c", script], cwd=tmp_path)
    assert ended.peak_bytes > MOST_BYTES and ended.wall_s > 0.3

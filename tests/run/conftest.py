"""One corpus and one cache for all whole runs of a session."""

from pathlib import Path

import pytest

from tests.support import runs


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "cache"


@pytest.fixture(scope="session")
def base(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, to fine-tune."""
    folder = tmp_path_factory.mktemp("base") / "run"
    runs.finish(runs.launch(0, runs.words(folder, text, train__steps=5), cache))
    return folder

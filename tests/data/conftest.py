"""A cache of its own for each test, and a tokenizer that takes no time to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptm.data.tokenizer import Tokenizer, train_tokenizer
from tests.support.texts import documents


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(documents(200)), 400)


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return str(folder / "tokenizer.json")

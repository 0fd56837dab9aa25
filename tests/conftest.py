"""Puts the repository on sys.path, and skips tests whose hardware is not here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_NEEDED_GPUS = {"gpu": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [(i, n) for i in items for m, n in _NEEDED_GPUS.items() if i.get_closest_marker(m)]
    if not needing:
        return
    import torch

    found = torch.cuda.device_count()
    for item, needed in needing:
        if found < needed:
            reason = f"needs {needed} CUDA device(s), {found} found"
            item.add_marker(pytest.mark.skip(reason=reason))

"""Suggestions against a plain recursive definition of the distance."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.common.near import distance, nearest

WORD = st.text("abc", max_size=6)


@cache
def truth(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    best = min(truth(a[:-1], b) + 1, truth(a, b[:-1]) + 1, truth(a[:-1], b[:-1]) + (a[-1] != b[-1]))
    if a[-2:] == b[-2:][::-1] and len(a) > 1 and len(b) > 1:
        best = min(best, truth(a[:-2], b[:-2]) + 1)
    return best


@settings(max_examples=500, deadline=None)
@given(WORD, WORD, st.integers(0, 6))
def test_distance(a: str, b: str, limit: int) -> None:
    exact = truth(a, b)
    found = distance(a, b, limit)
    assert found == exact if exact <= limit else found > limit


def test_nearest() -> None:
    keys = ["optim.beta1", "optim.beta2", "train.lr", "train.clip"]
    assert nearest("optim.beta3", keys) == ["optim.beta1", "optim.beta2"]
    assert nearest("trian.lr", keys) == ["train.lr"]
    assert nearest("something.else", keys) == []
    assert nearest("x" * 100_000, keys) == []

"""Bytes, counts and seconds, both ways."""

from __future__ import annotations

import pytest

from ptm.common import units
from ptm.common.errors import RecipeError


@pytest.mark.parametrize(
    "text, size",
    [
        ("80GiB", 80 * 2**30),
        ("80G", 80 * 2**30),
        ("1.5 MB", 1_500_000),
        ("23.27gb", 23_270_000_000),
        ("12 B", 12),
        ("7", 7),
        (7, 7),
        ("2tib", 2**41),
    ],
)
def test_parse_bytes(text: str | int, size: int) -> None:
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "1e9", "1 PB", "nan", True, "1GiB2"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="hardware.memory="):
        units.parse_bytes(text, key="hardware.memory")


@pytest.mark.parametrize(
    "size, long, short",
    [
        (0, "0 B", "0"),
        (1023, "1,023 B", "1023"),
        (2**20, "1.00 MiB", "1M"),
        (1.3 * 2**30, "1.30 GiB", "1.3G"),
        (500 * 2**30, "500.00 GiB", "500G"),
        (3 * 2**40, "3.00 TiB", "3.0T"),
    ],
)
def test_format_bytes(size: float, long: str, short: str) -> None:
    assert (units.format_bytes(size), units.short_bytes(size)) == (long, short)


@pytest.mark.parametrize(
    "count, text",
    [(812, "812"), (59_818_240, "59.8 M"), (1_500, "1.50 k"), (39_942_842_368, "39.94 B")],
)
def test_format_count(count: float, text: str) -> None:
    assert units.format_count(count) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(-5, "00:00:00"), (723.9, "00:12:03"), (86_399, "23:59:59"), (183_600, "2d03h")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text

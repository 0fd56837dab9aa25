"""Bytes, counts and seconds for people, and back.

Bytes are binary (KiB = 1024); a plain K, M, G or T is read as binary too, because an "80G" card or
a "24G" limit means that. KB, MB, GB and TB are read as decimal, as files are counted. The short
form `1.3G` is for log lines, the long form `1.30 GiB` for tables and errors. Names of variables end
in their unit (`page_bytes`, `step_s`, `batch_tokens`); nothing here guesses a unit from a name.
"""

from __future__ import annotations

import re

from ptm.common.errors import RecipeError, line

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_SIZES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """`1.30 GiB`, `64.00 MiB`, `512 B`."""
    for name, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:,.2f} {name}"
    return f"{count:,.0f} B"


def short_bytes(count: float) -> str:
    """`1.3G`, `64M`, `512`: no space, for log lines."""
    for letter, size in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if abs(count) >= size:
            value = count / size
            return (
                f"{value:.1f}{letter}" if value < 100 and letter in "TG" else f"{value:.0f}{letter}"
            )
    return f"{count:.0f}"


def parse_bytes(value: str | int | float, *, key: str = "bytes") -> int:
    """Bytes from `80GiB`, `80G`, `512 MB` (decimal) or a number. Raises RecipeError of `key`."""
    matched = _BYTES.fullmatch(str(value))
    if matched is None or isinstance(value, bool):
        raise RecipeError(
            line(key, value, "must be a size in bytes", "write it like 80GiB or 512MiB")
        )
    letter, unit = matched[2].upper(), (matched[3] or "").upper()
    sizes = _DECIMAL if letter and unit == "B" else _SIZES
    return int(float(matched[1]) * sizes[letter])


def format_count(count: float) -> str:
    """`39.94 B`, `59.8 M`, `812`: parameters or tokens, decimal."""
    for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.2f} {name}" if value < 10 or name in "TB" else f"{value:.1f} {name}"
    return f"{count:,.0f}"


def format_duration(seconds: float) -> str:
    """`00:12:03`, from a day on `2d03h`."""
    whole = max(0, int(seconds))
    if whole >= 86_400:
        return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"

"""The expert-load map: one small picture a layer, steps to the right, experts downwards.

A cell is an expert's share over its fair share, on a logarithmic scale from an eighth to eight
times: blue below, red above, a colour of its own for experts that got nothing at all. Pictures are
palette PNGs written here with zlib, because 24 layers x 32 experts x 200 columns as SVG would be
9 MB; the same pixels are stored with a light and a dark palette. The page's hover reads the level
back from the pixel.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

MISSING, DEAD, FIRST_LEVEL, NUM_LEVELS = 0, 1, 2, 61
_OCTAVES = 3.0  # the scale ends at 2**-3 and 2**3
_LIGHT = ((33, 102, 190), (244, 242, 238), (200, 50, 30))
_DARK = ((80, 160, 255), (38, 40, 46), (255, 110, 70))
_DEAD = {"light": (20, 20, 24), "dark": (250, 250, 250)}
_NOTHING = {"light": (255, 255, 255), "dark": (24, 25, 29)}


def levels(share_CE: np.ndarray) -> np.ndarray:
    """Palette index of each cell. Shapes: share_CE (columns, E) -> (E, columns) uint8."""
    ratio = share_CE.T * share_CE.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        octave = np.clip(np.log2(ratio), -_OCTAVES, _OCTAVES)
    scaled = np.rint((octave + _OCTAVES) / (2 * _OCTAVES) * (NUM_LEVELS - 1)) + FIRST_LEVEL
    scaled = np.where(ratio == 0, DEAD, scaled)
    return np.where(np.isnan(ratio), MISSING, scaled).astype(np.uint8)


def palette(theme: str) -> list[tuple[int, int, int]]:
    low, middle, high = _LIGHT if theme == "light" else _DARK
    ramp = []
    for level in range(NUM_LEVELS):
        at = 2 * level / (NUM_LEVELS - 1) - 1
        end, weight = (low, -at) if at < 0 else (high, at)
        ramp.append(tuple(round(m + (e - m) * weight) for m, e in zip(middle, end)))
    return [_NOTHING[theme], _DEAD[theme], *ramp]  # type: ignore[list-item]


def data_uri(index_EC: np.ndarray, theme: str) -> str:
    """The cells as a PNG of one pixel each, in a data: address."""
    rows, columns = index_EC.shape
    pixels = b"".join(b"\0" + row.tobytes() for row in index_EC)  # filter 0 before every row
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(channel for colour in palette(theme) for channel in colour)),
            _chunk(b"IDAT", zlib.compress(pixels, 9)),
            _chunk(b"IEND", b""),
        ]
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def meaning(index: int) -> str:
    """What a palette index says, in words."""
    if index in (MISSING, DEAD):
        return "not logged" if index == MISSING else "got nothing"
    octave = ((index - FIRST_LEVEL) / (NUM_LEVELS - 1) * 2 - 1) * _OCTAVES
    return f"{2**octave:.2f} x its fair share"

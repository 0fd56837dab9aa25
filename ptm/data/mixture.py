"""The order of the data as pure functions of a seed and an index: nothing is drawn or stored.

`permutation(n, *key)` sorts 0..n-1 by SplitMix64 hashes (Steele, Lea, Flood 2014, doi
10.1145/2660193.2660195), written out here in integers, so no library's generator can change the
order with its next version. The hashes of one key all differ (the mixing is a bijection of 64
bits), so the order is the same whatever sort numpy uses.

`Mixture` says which source gives row i, and which of its rows that is. Rows come in blocks of
BLOCK_ROWS; every block holds the same number of rows of each source (largest remainder), in an
order of its own. How often a source came up before row i is then a product and one short table, so
any row of any step is found in the same time: the whole state of the data is the step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ptm.common.errors import DataError, line

BLOCK_ROWS = 1000
"""Weights are exact to 0.1 % in every block; a smaller share than half of that cannot be given."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer of each uint64: a bijection that scatters neighbours."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """0..n-1 (int64) in an order that depends on every number of `key`."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state + _GOLDEN + np.uint64(part & _MASK))
    hashes = splitmix64(state + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return np.argsort(hashes, kind="stable")


class Mixture:
    """Which source gives row `index` of an endless order, in constant time."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.quotas = quotas(weights)
        self.seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, which of its rows) of row `index`; each row of a source comes up once."""
        if len(self.quotas) == 1:
            return 0, index
        block, slot = divmod(index, BLOCK_ROWS)
        sources, ranks = self._block(block)
        source = int(sources[slot])
        return source, block * self.quotas[source] + int(ranks[slot])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        # The source of each slot, and how many slots of that source come before it.
        in_order = np.repeat(np.arange(len(self.quotas)), self.quotas)
        sources = in_order[permutation(BLOCK_ROWS, self.seed, block)]
        ranks = np.zeros(BLOCK_ROWS, np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


def quotas(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a block of BLOCK_ROWS, by largest remainder.

    Raises: DataError for a source too light to get one.
    """
    shares = [BLOCK_ROWS * w / sum(weights) for w in weights]
    found = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (found[i] - shares[i], i))
    for i in by_remainder[: BLOCK_ROWS - sum(found)]:
        found[i] += 1
    if 0 in found:
        weight = weights[found.index(0)]
        rule = f"is less than one row in {BLOCK_ROWS}, the finest share that can be mixed"
        raise DataError(line("data.weights", weight, rule, "raise it, or leave the source out"))
    return found

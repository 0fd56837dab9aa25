"""The order of the data: frozen, complete, in proportion."""

from __future__ import annotations

import numpy as np
import pytest

from ptm.common.errors import DataError
from ptm.data.mixture import BLOCK_ROWS, Mixture, permutation, quotas, splitmix64


def test_splitmix64_is_the_published_generator() -> None:
    # First outputs for seed 1234567, as listed with the reference C code (rosettacode.org).
    steps = np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(steps + np.uint64(1234567)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_permutation_is_frozen() -> None:
    """A change here changes the order of every run that will be resumed."""
    assert permutation(8, 1, 2, 3).tolist() == [5, 0, 7, 3, 6, 1, 4, 2]
    assert permutation(8, 1, 2, 4).tolist() == [5, 1, 2, 3, 0, 4, 6, 7]
    assert permutation(5, -1, 2**70).tolist() == [1, 3, 2, 4, 0]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_each_number_once(n: int) -> None:
    assert sorted(permutation(n, 7)) == list(range(n))


def test_permutation_scatters() -> None:
    # Over many keys each position holds each number about equally often: chi-square of 8 x 8
    # cells with 49 degrees of freedom, whose 99.99 % quantile is 94.
    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), permutation(8, key)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 94


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (0.7, 0.2, 0.1), (1, 2, 4), (998, 1, 1), (1e-9, 2e-9), (3,) * 7]
)
def test_quotas_are_the_nearest_to_the_weights(weights: tuple[float, ...]) -> None:
    found = quotas(weights)
    assert sum(found) == BLOCK_ROWS
    for quota, weight in zip(found, weights):
        assert abs(quota - BLOCK_ROWS * weight / sum(weights)) < 1


def test_quotas_refuse_what_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="data.weights=1: is less than one row in 1000"):
        quotas((9999, 1))


def test_every_row_of_a_source_comes_up_once_and_in_proportion() -> None:
    mixture = Mixture((0.5, 0.3, 0.2), seed=3)
    located = [mixture.locate(i) for i in range(5 * BLOCK_ROWS)]
    for source, share in enumerate((0.5, 0.3, 0.2)):
        own = [row for s, row in located if s == source]
        assert own == list(range(round(share * 5 * BLOCK_ROWS)))
    for start in range(0, 5 * BLOCK_ROWS - 100, 100):  # mixed everywhere, not in lumps
        assert {s for s, _ in located[start : start + 100]} == {0, 1, 2}
    assert located[:1000] != located[1000:2000]
    assert [Mixture((0.5, 0.3, 0.2), seed=4).locate(i) for i in range(99)] != located[:99]


def test_far_rows_are_found_directly() -> None:
    mixture = Mixture((1, 3), seed=0)
    far = 10**12
    rows = [mixture.locate(i) for i in range(far * BLOCK_ROWS, far * BLOCK_ROWS + BLOCK_ROWS)]
    assert sorted(row for s, row in rows if s == 0) == list(range(far * 250, far * 250 + 250))

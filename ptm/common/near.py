"""Which known word a misspelt one was meant to be.

Distance counts inserted, deleted, replaced and swapped neighbouring letters (optimal string
alignment), so that every typo of one keystroke has its word at distance 1. All words at the
least distance are returned: `beta3` is as near to `beta1` as to `beta2`, and a guess between
them would be wrong half the time.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST = 3  # suggestions in one message


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to MOST known words at the least distance, which is at most a third of their letters."""
    word = word[:200]
    least = len(word)
    best: list[str] = []
    for candidate in known:
        limit = min(least, max(1, min(len(word), len(candidate)) // 3))
        d = distance(word, candidate, limit)
        if d > limit:
            continue
        if d < least:
            least, best = d, []
        best.append(candidate)
    return best[:MOST]


def distance(a: str, b: str, limit: int) -> int:
    """Edits between two words, or any number above `limit` if there are more than that."""
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(b, 1):
            d = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                d = min(d, last[j - 2] + 1)
            row.append(d)
        if min(row) > limit and (not before or min(before) > limit):
            return limit + 1
    return row[-1]

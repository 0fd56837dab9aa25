"""Words one keystroke away from a word, and words for values that nobody should accept."""

from __future__ import annotations

import random
from collections.abc import Iterator


def one_edit(word: str, seed: int) -> Iterator[str]:
    """Each deletion and swap, and one insertion and replacement at each position."""
    letters = random.Random(f"{seed} {word}")
    for i in range(len(word) + 1):
        letter = letters.choice("abcdefghijklmnopqrstuvwxyz0123456789_")
        yield word[:i] + letter + word[i:]
        if i < len(word):
            yield word[:i] + word[i + 1 :]
            yield word[:i] + letter + word[i + 1 :]
        if i + 1 < len(word):
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]

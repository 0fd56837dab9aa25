"""Small corpora to train and test on: made text that is the same on every machine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEXT = "the cat sat on a mat and saw 12 dogs run: def f(x): return x + 1\n été 中文 🙂"
WORDS = TEXT.split(" ")


def documents(count: int, *, seed: int = 0, least: int = 5, most: int = 60) -> list[str]:
    """Different texts of `least` to `most` words."""
    draw = random.Random(seed)
    return [
        f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(least, most)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, **more}, ensure_ascii=False) for text in texts]
    path.write_text("".join(row + "\n" for row in rows))
    return path

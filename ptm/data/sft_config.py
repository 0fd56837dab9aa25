"""The `sft` section of a recipe: which conversations, and how answers are judged."""

from __future__ import annotations

from ptm.common.config import config, ranged
from ptm.common.errors import RecipeError, line
from ptm.common.near import nearest

TASK_SOURCE = "tasks"
TASK_NAMES = (
    "add", "subtract", "larger", "longest", "first", "last", "upper", "count", "name", "docstring",
)  # fmt: skip


def check_tasks(section: str, tasks: tuple[str, ...]) -> None:
    """Raise RecipeError for a task that is not built in; `section` is whose key `tasks` is."""
    for name in tasks:
        if name not in TASK_NAMES:
            near = nearest(name, TASK_NAMES)
            remedy = f"did you mean {' or '.join(near)}?" if near else "choose of "
            remedy += "" if near else ", ".join(TASK_NAMES)
            rule = "is not one of the built-in tasks"
            raise RecipeError(line(f"{section}.tasks", name, rule, remedy))


@config
class SftConfig:
    source: tuple[str, ...] = (TASK_SOURCE,)
    """Where conversations are: folders, globs or files of .jsonl or .parquet; `tasks` are questions
    with exact answers, made from a seed and the standard library."""
    tasks: tuple[str, ...] = TASK_NAMES
    "Which of the built-in tasks `tasks` stands for."
    task_rows: int = ranged(4000, least=1, most=1_000_000)
    "How many questions of the built-in tasks are trained on."
    template: str | None = None
    """Chat template: m32 (question<sep>answer<eod>), chatml, or a .jinja file; null is the
    tokenizer's own, or m32 where it has none and the tokenizer has <sep>."""
    answers: int = ranged(64, least=0, most=100_000)
    "Held-out questions that are answered, to count exact answers, at each evaluation."
    answer_tokens: int = ranged(24, least=1, most=4096)
    "Longest answer, in tokens; questions whose right answer is longer are not asked."

    def check(self) -> None:
        if isinstance(self.source, str):  # one source needs no brackets
            object.__setattr__(self, "source", (self.source,))
        if not self.source or not all(self.source):
            remedy = "give .jsonl files, or tasks"
            raise RecipeError(line("sft.source", self.source, "must name at least one", remedy))
        check_tasks("sft", self.tasks)

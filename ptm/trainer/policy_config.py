"""Settings of the modes that learn from preferences (dpo) and from rewards (grpo)."""

from __future__ import annotations

from ptm.common.config import config, ranged
from ptm.common.errors import RecipeError, line
from ptm.data.sft_config import check_tasks

TASK_SOURCE = "tasks"
DEFAULT_TASKS = ("larger", "longest", "first", "last", "upper", "count")


def _check(key: str, source: str, tasks: tuple[str, ...]) -> None:
    if not source:
        remedy = "give a .jsonl or .parquet file, or tasks"
        raise RecipeError(line(f"{key}.source", source, "must name a file", remedy))
    check_tasks(key, tasks)


@config
class DpoConfig:
    source: str = TASK_SOURCE
    """Where pairs are: a folder, glob or file of .jsonl or .parquet with prompt, chosen and
    rejected; `tasks` makes them of questions with exact answers."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    "Which of the built-in tasks `tasks` stands for."
    task_rows: int = ranged(1000, least=1, most=1_000_000)
    "How many pairs of the built-in tasks are trained on."
    beta: float = ranged(0.1, above=0.0, most=100.0)
    "How strongly a margin counts: larger stays nearer to the reference."
    length_normalised: bool = False
    "Average an answer's log-probability over its tokens, so that long answers weigh no more."
    eval_pairs: int = ranged(128, least=1, most=100_000)
    "Held-out pairs in an evaluation."

    def check(self) -> None:
        _check("dpo", self.source, self.tasks)


@config
class GrpoConfig:
    source: str = TASK_SOURCE
    """Where prompts are: a folder, glob or file of .jsonl or .parquet with prompt and, if the
    reward wants it, answer; `tasks` makes questions with exact answers."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    "Which of the built-in tasks `tasks` stands for."
    task_rows: int = ranged(1000, least=1, most=1_000_000)
    "How many questions of the built-in tasks are trained on."
    reward: str = "exact"
    """What scores an answer: exact, contains, or path/to/file.py:function, called as
    function(question, answer, text)."""
    reward_timeout_s: float = ranged(5.0, above=0.0, most=3600.0)
    "Seconds for one call of the reward; a call that takes longer is a reward of 0."
    group_size: int = ranged(8, least=2, most=1024)
    "Answers to one prompt, whose rewards are compared."
    max_new_tokens: int = ranged(256, least=1, most=65_536)
    "Longest answer; one that has not ended by then has a reward of 0."
    temperature: float = ranged(1.0, above=0.0, most=10.0)
    "Of the rollout, and of the log-probabilities in the loss."
    clip: float = ranged(0.2, above=0.0, below=1.0)
    "How far a token's importance ratio may be from 1 and still move the weights."
    kl_coef: float = ranged(0.0, least=0.0, most=10.0)
    """Weight of the KL term to the initial policy; above 0 a frozen copy of train.init_from is
    held by every rank."""
    replay_routes: bool = True
    "Send each token of the update to the experts that the rollout sent it to."
    eval_prompts: int = ranged(128, least=1, most=100_000)
    "Held-out prompts that are answered in an evaluation."

    def check(self) -> None:
        _check("grpo", self.source, self.tasks)

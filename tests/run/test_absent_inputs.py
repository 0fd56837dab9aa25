"""What a recipe names and is not there is told in one line, before a run folder is made."""

from pathlib import Path

import pytest

from ptm.cli import run
from ptm.data.tokenizer import Tokenizer, train_tokenizer
from tests.support import runs

REWARDS = "def good(question, answer, text):\n    return 1.0\n"
CASES = [
    ("sft", "sft.source=FOLDER/gone.jsonl", 4, "does not exist; name a folder, a glob or tasks"),
    ("dpo", "dpo.source=FOLDER/gone.jsonl", 4, "does not exist; name a folder, a glob or tasks"),
    ("pretrain", "data.source=FOLDER/gone", 4, "does not exist; name a folder, a glob or python_s"),
    ("sft", "sft.tasks=[frist]", 2, "did you mean first?"),
    ("grpo", "sft.template=FOLDER/gone.jinja", 2, "cannot be read: No such file or directory; "),
    ("sft", "sft.template=FOLDER/broken.jinja", 4, "cannot be used: TemplateSyntaxError: "),
    ("grpo", "grpo.reward=exakt", 2, "is neither a built-in reward nor a function in a file; "),
    ("grpo", "grpo.reward=FOLDER/gone.py:good", 2, "there is no file FOLDER/gone.py; "),
    ("grpo", "grpo.reward=FOLDER/rewards.py:bad", 2, "FOLDER/rewards.py has no function bad; "),
    ("sft", "train.init_from=FOLDER/gone", 4, "is not there, and fine-tuning starts from it; "),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a model's folder as is looked at before a run."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer: Tokenizer = train_tokenizer(iter(["some text to learn from"] * 9), 300)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("mode, word, code, rule", CASES, ids=[case[1] for case in CASES])
def test_refused_before_a_run_folder_is_made(
    mode: str,
    word: str,
    code: int,
    rule: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    (tmp_path / "a.txt").write_text("text")
    key, _, value = word.replace("FOLDER", str(tmp_path)).partition("=")
    given = {"mode": mode, "train.init_from": base, "grpo.group_size": 2, "grpo.max_new_tokens": 8}
    given[key] = value
    words = runs.words(tmp_path / "run", tmp_path / "a.txt", **given)
    assert run(["train", *words]) == code
    told = capsys.readouterr().err.splitlines()
    assert f"{key}={value.strip('[]')}"[:70] in told[-1]
    assert rule.replace("FOLDER", str(tmp_path)) in told[-1]
    assert not (tmp_path / "run").exists()

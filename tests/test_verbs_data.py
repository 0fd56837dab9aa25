"""`ptm data check` and `show` with the modes that learn from answers."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ptm.cli import run
from ptm.data.tokenizer import train_tokenizer
from ptm.jobs import DataJob
from ptm.recipe import Recipe, load_recipe
from ptm.tuning import base_tokenizer
from ptm.verbs_data import load_tokenizer, open_rows, show
from tests.support import runs
from tests.support.texts import documents

DIM = re.compile("\x1b\\[2m.*?\x1b\\[0m", re.DOTALL)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a model's folder as the verb needs."""
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer(iter(documents(100)), 400).save(folder / "tokenizer")
    return folder


def chat(question: str, answer: str) -> dict:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(mode: str, path: Path, base: Path, **changes) -> list[str]:
    given = {"mode": mode, f"{mode}.source": path, "train.init_from": base}
    given |= {"data.eval_fraction": 0.2} | changes
    return runs.words(path.parent / "run", path.parent / "no-text", **given)


ROWS = {
    "sft": [chat(f"what is {i} plus 1?", f"it is {i + 1}") for i in range(80)],
    "dpo": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(80)],
    "grpo": [{"prompt": f"{i}?", "answer": "yes"} for i in range(80)],
}
BAD = {
    "sft": {
        3: ({"messages": []}, "'messages' is empty"),
        9: (chat("q", "a<eod>b"), "a message spells the special token <eod>"),
    },
    "dpo": {
        3: ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        9: ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
    },
    "grpo": {
        3: ([1], "not a JSON object but a list"),
        9: ({"prompt": "word " * 90, "answer": "a"}, "tokens, and a row has room for 49"),
    },
}


@pytest.mark.parametrize("mode", ROWS)
def test_check_lists_the_bad_rows_of_the_mode(
    mode: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(ROWS[mode])
    for number, (row, _) in BAD[mode].items():
        rows[number - 1] = row
    path = write(tmp_path / "rows.jsonl", rows)
    given = words(mode, path, base, **{"grpo.max_new_tokens": 16, "grpo.group_size": 2})
    assert run(["data", "check", *given, "data.max_bad_fraction=0.1"]) == 0
    *listed, counted = capsys.readouterr().out.splitlines()
    assert counted == f"{path}: 78 rows, 2 bad rows"
    assert len(listed) == 2
    told = {line.removeprefix(f"{path}:").partition(": ")[0]: line for line in listed}
    for number, (_, reason) in BAD[mode].items():
        assert reason in told[str(number)]
    assert run(["data", "check", *given]) == 4
    rule = f"data.max_bad_fraction=0.01: 2 of 80 rows of {path} are not usable, first {path}:3: "
    assert rule in capsys.readouterr().err.splitlines()[-1]


def shown(recipe: Recipe, row: int) -> tuple[str, list[str]]:
    """The first line, and the rest without what is dim, by document."""
    fields = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
    job = DataJob(action="show", row=row, **fields)  # type: ignore[arg-type]
    config = base_tokenizer(job)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, highlight=False, soft_wrap=True, width=300)
    assert config.tokenizer is not None
    show(job, config, load_tokenizer(config.tokenizer), console)
    head, _, rest = out.getvalue().partition("\n")
    parts = re.split("\x1b\\[36m\u2500[^\n]*\n", rest)[1:]
    return head, [DIM.sub("", part).strip() for part in parts]


def test_show_prints_a_row_as_it_is_learned(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS["sft"])
    recipe = load_recipe(words("sft", path, base))
    for row in (0, 3):
        head, parts = shown(recipe, row)
        assert all(re.fullmatch(r"it is \d+<eod>", part) for part in parts)
        assert f"{len(parts)} documents" in head and parts
    config = base_tokenizer(recipe)
    assert config.tokenizer is not None
    rows = open_rows(recipe, config, load_tokenizer(config.tokenizer))
    assert len(rows.train) > len(parts)

    path = write(tmp_path / "pairs.jsonl", ROWS["dpo"])
    head, parts = shown(load_recipe(words("dpo", path, base)), 5)
    assert parts == ["yes<eod>", "no<eod>"] and "2 documents" in head
    path = write(tmp_path / "prompts.jsonl", ROWS["grpo"])
    recipe = load_recipe(
        words("grpo", path, base, **{"grpo.max_new_tokens": 16, "grpo.group_size": 2})
    )
    head, parts = shown(recipe, 5)
    assert parts == [""] and "0 labels with loss" in head


def test_show_takes_the_seed_and_the_length_of_training(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS["sft"])
    recipe = load_recipe(words("sft", path, base))
    other = replace(recipe, train=replace(recipe.train, seed=recipe.train.seed + 1))
    assert shown(recipe, 0)[1] != shown(other, 0)[1]
    longer = replace(recipe, train=replace(recipe.train, seq_len=128))
    assert len(shown(longer, 0)[1]) > len(shown(recipe, 0)[1])

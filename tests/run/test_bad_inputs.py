"""Two hundred bad inputs through the command line: the right code, one line, nothing lost, nothing
run.

Each case is made by a generator from a seed and its number, so a failure names what to look at.
The words go through `ptm.cli.run`, as `ptm VERB ...` would; tests/test_cli.py covers processes
and ranks.
"""

import json
import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ptm.cli import run
from tests.support import runs

pytestmark = pytest.mark.slow
SEED = 20260
GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
STEP = 20
Case = tuple[list[str], int]
"""Words after `ptm`, and the exit code they must end with."""

VALUES = ("nan", "inf", "-1", "1e400", "[1,2]", "{a: 1}", "true", "x", "0x10", "1:30", "${x}", "é")
KEYS = ("train.steps", "train.lr", "train.seq_len", "train.micro_batch_size", "model.hidden_size",
        "model.num_experts", "model.scale", "model.router", "engine.kind", "checkpoint.keep",
        "data.eval_fraction", "optim.beta1", "eval.rows", "resume", "dry_run")  # fmt: skip


class Canary:
    """Unpickled, it makes a folder that must never appear."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def trained(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = runs.launch(0, runs.words(folder, text), cache)
    assert done.returncode == 0, done.stderr
    return folder


def bad_word(rng: random.Random, folder: Path, trained: Path) -> Case:
    """A key with a letter changed, or a value no key takes."""
    key = rng.choice(KEYS)
    if rng.random() < 0.5:
        i = rng.randrange(len(key))
        return ["train", f"{key[:i]}q{key[i + 1 :]}=1", f"run.dir={folder / 'never'}"], 2
    is_flag = key in ("dry_run",)
    values = [v for v in VALUES if not (is_flag and v == "true")]
    return ["train", f"{key}={rng.choice(values)}", f"run.dir={folder / 'never'}"], 2


def bad_recipe_file(rng: random.Random, folder: Path, trained: Path) -> Case:
    texts = (
        "train: {steps: 1, steps: 2}\n",
        "train: &a {steps: 1}\nmodel: *a\n",
        "!!python/object/apply:os.mkdir [canary]\n",
        "train:\n  step: 5\n",
        "train:\n\tsteps: 5\n",
        "[1, 2]\n",
        "base: ../x.yaml\n",
        "base: recipe.yaml\n",
        "log: {project: '${oc.env:HOME}'}\n",
        "train: {lr: .nan}\n",
        "--- {}\n--- {}\n",
        "train: " + "{a: " * 40 + "1" + "}" * 40 + "\n",
        "\x00\x01",
        "x" * 2_000_000,
        "train: {steps: '5'}\nmodel: {scale: huge}\n",
    )
    path = folder / "recipe.yaml"
    path.write_text(rng.choice(texts))
    return ["train", f"recipe={path}", f"run.dir={folder / 'never'}"], 2


def bad_data(rng: random.Random, folder: Path, trained: Path) -> Case:
    good = json.dumps({"text": "a sentence of text " * 50}) + "\n"
    lines = ("{", "[]", "5", '{"text": 5}', '{"txt": "a"}', '{"text": null}', '{"text": "a",}')
    kind = rng.randrange(6)
    if kind == 0:
        return ["data", "prepare", f"data.source={folder / 'nowhere'}"], 4
    path = folder / rng.choice(("a.jsonl", "b.jsonl"))
    if kind == 1:
        path.write_text("")
    elif kind == 2:
        path.write_text(good * 3 + rng.choice(lines) + "\n")
    elif kind == 3:
        path.write_bytes(good.encode() * 3 + b'{"text": "\xff\xfe"}\n')
    elif kind == 4:
        path = folder / rng.choice(("c.jsonl.gz", "c.jsonl.zst", "c.parquet"))
        path.write_bytes(rng.randbytes(200))
    else:
        (folder / "loop").symlink_to(folder / "loop")
        path = folder / "loop"
    words = ["data", "prepare", f"data.source={path}", "data.bad_rows=fail"]
    return [*words, "model.vocab_size=300"], 4


def bad_tokenizer(rng: random.Random, folder: Path, trained: Path) -> Case:
    whole = (trained / "tokenizer" / "tokenizer.json").read_bytes()
    path = folder / "tokenizer.json"
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(whole[: rng.randrange(len(whole) - 1)])
    elif kind == 1:
        path.write_text(rng.choice(("{}", "[]", "null", '{"model": 5}', '{"version": "1.0"}')))
    elif kind == 2:
        path.write_bytes(rng.randbytes(500))
    elif kind == 3:
        path = folder / "a.model"
        path.write_bytes(rng.randbytes(500))
    elif kind == 4:
        path.write_bytes(pickle.dumps(Canary(folder / "canary")))
    else:
        path = folder / "nowhere.json"
    text = folder / "text.txt"
    text.write_text("some text " * 100)
    return ["data", "prepare", f"data.source={text}", f"data.tokenizer={path}"], 4


def bad_checkpoint(rng: random.Random, folder: Path, trained: Path) -> Case:
    """One file of a copied step changed, cut, lost, added, swapped or replaced by a pickle."""
    step = folder / f"step-{STEP:08d}"
    shutil.copytree(trained / "checkpoints" / step.name, step)
    path = rng.choice(sorted(p for p in step.rglob("*") if p.is_file()))
    raw = bytearray(path.read_bytes())
    kind = rng.randrange(7)
    if kind <= 1:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
    elif kind == 2:
        path.write_bytes(raw[: rng.randrange(len(raw))])
    elif kind == 3:
        path.unlink()
    elif kind == 4:
        (step / "extra.safetensors").write_bytes(raw)
    elif kind == 5:
        path.write_bytes(pickle.dumps(Canary(folder / "canary")))
    else:
        path.write_bytes(b"")
    verb = rng.choice((["eval"], ["generate"], ["convert"]))
    if verb == ["convert"]:
        return ["convert", f"source={step}", f"out={folder / 'out'}", "to=hf"], 4
    return [*verb, str(step)], 4


def bad_config(rng: random.Random, folder: Path, trained: Path) -> Case:
    """A published folder whose config.json lies."""
    model = folder / "model"
    shutil.copytree(GOLDEN, model)
    values = json.loads((model / "config.json").read_text())
    key = rng.choice(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
    changes = (
        {key: rng.choice((-1, 0, 2**70, 1.5, "x", None, [1], True))},
        {key: values[key] + rng.choice((1, 2, 64))},
        {"moe_config": rng.choice((None, [], {"moe_num_experts": -3}, {"moe_top_k": 99}))},
        {"_attn_implementation_internal": "someone/evil"},
        {"rms_norm_eps": rng.choice(("nan", -1, 10**400))},
        {"hidden_act": "gelu"},
    )
    text = json.dumps(values | rng.choice(changes))
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice((text[:-20], "[" * 100_000, "[]", "5", '{"a": NaN}', text + text))
    (model / "config.json").write_text(text)
    for name in ("pytorch_model.bin", "modeling_yuan.py", "tokenizer.pkl"):
        (model / name).write_bytes(pickle.dumps(Canary(folder / "canary")))
    (model / "modeling_yuan.py").write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")
    return ["convert", f"source={model}", f"out={folder / 'out'}", "to=ptm"], 4


MAKERS: list[tuple[Callable[[random.Random, Path, Path], Case], int]] = [
    (bad_word, 50),
    (bad_recipe_file, 30),
    (bad_data, 30),
    (bad_tokenizer, 25),
    (bad_checkpoint, 45),
    (bad_config, 40),
]
CASES = [(make, number) for make, count in MAKERS for number in range(count)]


def test_there_are_two_hundred() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("make", "number"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_bad_input(
    make: Callable[[random.Random, Path, Path], Case],
    number: int,
    trained: Path,
    cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(f"{SEED} {make.__name__} {number}")
    monkeypatch.setenv("PTM_CACHE", str(cache))
    words, code = make(rng, tmp_path, trained)
    capfd.readouterr()
    started = time.monotonic()
    assert run(words) == code, (words, capfd.readouterr())
    assert time.monotonic() - started < 10.0
    said = capfd.readouterr().err.strip().splitlines()
    said = [line for line in said if not line.startswith(("data:", "tokenizing"))]
    assert len(said) == 1, said
    assert re.match(r"[\w./: -]+=.*: .+; .+", said[0]), said
    assert not (tmp_path / "canary").exists() and not (tmp_path / "never").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_checkpoint_is_as_it_was(trained: Path) -> None:
    """After all of the above, the run they were made from still opens."""
    assert run(["eval", str(trained), "rows=4"]) == 0

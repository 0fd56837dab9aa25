"""What a recipe resolves to: the order of its sources, scales, bases, names, and its rules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptm
from ptm.common.errors import RecipeError
from ptm.common.parse import schema_of
from ptm.model.config import Scale, num_parameters
from ptm.recipe import NAMES, Recipe, describe_difference, difference, dump, load_recipe
from ptm.recipe_files import read_chain, shipped


def no_accelerator() -> bool:
    return False


def load(*words: str) -> Recipe:
    return load_recipe(words, has_accelerator=no_accelerator)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """mine.yaml on base.yaml, each with scales."""
    (tmp_path / "base.yaml").write_text(
        "train: {lr: 1e-3, steps: 100, warmup_steps: 0, clip: 2.0}\n"
        "scales:\n"
        "  mini: {train: {lr: 2e-3, clip: 3.0}}\n"
        "  full: {train: {lr: 4e-3}}\n"
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "base: base.yaml\ntrain: {lr: 5e-3}\nscales: {mini: {train: {steps: 7}}}\n"
        "data.source: [a, b]\n"
    )
    return mine


def test_later_sources_win(chain: Path) -> None:
    train = load(f"recipe={chain}", "train.seed=3").train
    assert train.min_lr == 0.1  # default
    assert train.clip == 3.0  # base's scale over base
    assert train.lr == 5e-3  # the file over base and its scale
    assert train.steps == 7  # the file's scale
    assert train.seed == 3  # word
    assert load(f"recipe={chain}", "train.steps=9", "train.steps=8").train.steps == 8


def test_scale_is_chosen_before_it_is_laid(chain: Path) -> None:
    full = load(f"recipe={chain}", "model.scale=full")
    assert (full.train.clip, full.train.steps, full.model.scale) == (2.0, 100, Scale.full)
    base = chain.with_name("base.yaml")
    assert load(f"recipe={base}", "model.scale=full").train.lr == 4e-3


def test_lists_replace(chain: Path) -> None:
    assert load(f"recipe={chain}").data.source == ("a", "b")
    assert load(f"recipe={chain}", "data.source=c").data.source == ("c",)


@pytest.mark.parametrize("has, scale", [(True, "full"), (False, "mini")])
def test_auto_asks_for_an_accelerator_and_says_so(has: bool, scale: str) -> None:
    said: list[str] = []
    recipe = load_recipe(["recipe=m32"], has_accelerator=lambda: has, say=said.append)
    assert recipe.model.scale == scale
    assert len(said) == 1 and said[0].startswith("model.scale=auto: ") and scale in said[0]
    assert ("no accelerator" in said[0]) is not has


def test_no_accelerator_is_asked_for_when_the_scale_is_given() -> None:
    def must_not_ask() -> bool:
        raise AssertionError

    assert load_recipe(["model.scale=debug"], has_accelerator=must_not_ask).model.scale == "debug"


def test_a_recipe_without_scales_keeps_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {num_hidden_layers: 2}\n")
    recipe = load(f"recipe={file}")
    assert recipe.model.scale is Scale.auto and recipe.name == "own"
    rule = (
        "model.scale=mini: this recipe has no scales, as m32, .*, m32_prompt, .* have; leave it out"
    )
    with pytest.raises(RecipeError, match=rule) as e:
        load(f"recipe={file}", "model.scale=mini")
    assert "router_ablation" not in str(e.value)


def test_a_scale_that_the_recipe_lacks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("scales: {full: {train: {lr: 1e-3}}}\n")
    with pytest.raises(RecipeError, match="no accelerator is present, so mini.*only full"):
        load(f"recipe={file}")


def test_published_numbers_of_m32() -> None:
    full = load("recipe=m32", "model.scale=full")
    assert num_parameters(full.model) == 39_942_842_368
    t, o = full.train, full.optim
    assert (t.steps, t.warmup_steps, t.seq_len, t.batch_tokens) == (
        318_000,
        6_400,
        4096,
        1536 * 4096,
    )
    assert (t.lr, t.lr * t.min_lr, t.schedule, t.clip) == (1e-4, 1e-5, "cosine", 1.0)
    assert (o.kind, o.beta1, o.beta2, o.eps, o.weight_decay) == ("adamw", 0.9, 0.95, 1e-8, 0.1)


@pytest.mark.parametrize("scale, least, most", [("mini", 55e6, 60e6), ("debug", 0.3e6, 2e6)])
def test_small_scales_are_the_same_architecture(scale: str, least: float, most: float) -> None:
    m = load("recipe=m32", f"model.scale={scale}").model
    full = load("recipe=m32", "model.scale=full").model
    assert least <= num_parameters(m) <= most
    assert m.head_dim == 2 * m.rotary_dim and full.head_dim == 2 * full.rotary_dim
    for key in ("num_experts", "num_experts_per_tok", "router", "tie_word_embeddings", "rope_mode"):
        assert getattr(m, key) == getattr(full, key)


@pytest.mark.parametrize("other, key", NAMES.aliases.items())
def test_familiar_names_with_a_notice(other: str, key: str) -> None:
    schema = schema_of(Recipe)
    assert other not in schema.settings
    said: list[str] = []
    text = {"train.schedule": "constant", "data.source": "/d/*.jsonl"}.get(key, "1")
    words = [f"{other}={text}", "model.scale=debug", "optim.beta1=0.5", "train.warmup_steps=0"]
    if key == "train.seq_len":
        text = "64"
    words[0] = f"--{other}={text}"
    try:
        recipe = load_recipe(words, say=said.append)
    except RecipeError as e:  # beta=1 is out of range: under our name, with the word
        assert str(e).startswith(f"{key}=1") and str(e).endswith(f"(--{other}=1)")
        return
    assert said == [f"{other} is called {key} here"]
    value = schema.flatten(recipe)[key]
    assert str(value) in (text, "1.0", f"('{text}',)") or key == "train.warmup_steps"


def test_names_that_are_no_settings_here() -> None:
    for name, remedy in NAMES.absent.items():
        with pytest.raises(RecipeError) as e:
            load(f"{name}=4")
        assert str(e.value) == f"{name}=4: is not a setting here; {remedy}"


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "train.seq_len=1024",
            "train.seq_len=1024: must be at most model.max_position_embeddings=512",
        ),
        ("train.batch_tokens=1000", "multiple of train.seq_len=512; set train.batch_tokens=512"),
        ("train.batch_tokens=100", "multiple of train.seq_len=512; set train.batch_tokens=512"),
        ("train.micro_batch_size=17", "must be at most 16.*set train.micro_batch_size=16"),
        ("train.warmup_steps=999", r"must be at most train.steps=\d+; set train.warmup_steps=\d+"),
        ("train.steps=10", "train.warmup_steps=20: must be at most train.steps=10.*m32.yaml:"),
    ],
)
def test_rules_between_sections(words: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("model.scale=mini", *words.split())


@pytest.mark.parametrize(
    "words, message",
    [
        ("m32_dpo train.micro_batch_size=7", "a multiple of 2, as a pair is two rows; set.*=6"),
        ("m32_grpo grpo.group_size=3", "micro_batch_size=128: must be a multiple of 3, grpo.group"),
        ("m32_grpo grpo.max_new_tokens=64", "^grpo.max_new_tokens=64: leaves no place for a"),
        ("m32_dpo model.router_aux_loss_coef=0.1", "has no part in mode=dpo"),
        ("m32_lora adapter.targets=[q,kk]", "'kk' is no role; choose of q, k"),
    ],
)
def test_rules_of_fine_tuning(words: str, message: str) -> None:
    name, word = words.split()
    with pytest.raises(RecipeError, match=message):
        load(f"recipe={name}", "model.scale=mini", word)


def test_an_error_of_a_section_has_its_key_and_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("base: m32\n\nmodel:\n  hidden_size: 250\n")
    with pytest.raises(RecipeError) as e:
        load(f"recipe={file}")
    assert str(e.value).startswith("model.hidden_size=250: must be a multiple of")
    assert str(e.value).endswith(f"({file}:4)")


def test_the_dump_is_the_recipe_and_keeps_its_name(tmp_path: Path) -> None:
    recipe = load("recipe=m32", "train.lr=2e-3", "data.source=/x,/y", "run.name=first")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe))
    again = load(f"recipe={file}")
    assert again == recipe and again.recipe == "m32" and again.name == "first"
    assert load(f"recipe={file}", "train.lr=1e-3").train.lr == 1e-3
    with pytest.raises(
        RecipeError, match="model.scale=full: this recipe has no scales.*set it to mi"
    ):
        load(f"recipe={file}", "model.scale=full")  # its numbers are mini's


def test_difference_to_the_named_recipe() -> None:
    recipe = load("recipe=m32", "train.lr=2e-3", "log.wandb=off", "train.seed=1234")
    was = load("recipe=m32").train.lr
    assert difference(recipe) == {"train.lr": (was, 2e-3), "log.wandb": ("auto", "off")}
    text = describe_difference(recipe)
    assert f"train.lr=0.002  (was {was})" in text and "log.wandb=off  (was auto)" in text
    assert describe_difference(load("recipe=m32")).endswith("unchanged")


def test_names_of_runs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: m32\nrecipe: my own\n")
    assert load("recipe=m32").run_dir == Path("runs/m32-mini")
    assert load(f"recipe={file}").name == "my own-mini"
    assert load("run.name=a", "run.dir=/b/c").run_dir == Path("/b/c")
    assert load("run.name=a").run_dir == Path("runs/a")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["mode=dpo"],
            "adapter.kind=prompt: is for mode=sft and not mode=dpo; use adapter.kind=lora",
        ),
        (["adapter.prompt_tokens=512"], "adapter.prompt_tokens=512: leaves no place in rows of"),
        (
            ["adapter.base=int4", "engine.kind=fsdp"],
            "adapter.base=int4: needs pages, and engine.kind=fsdp has none; use engine.kind=paged",
        ),
        (
            ["adapter.kind=prefix", "mode=grpo"],
            "adapter.kind=prefix: is for mode=sft and not mode=grpo; use adapter.kind=lora",
        ),
        (["train.init_from=null"], "adapter.kind=prompt: has no weights to change"),
        (
            ["adapter.base=int4", "engine.zero=1"],
            "adapter.base=int4: would be whole weights in every block with engine.zero=1; leave",
        ),
        (
            ["qat.grid=int4"],
            "qat.grid=int4: trains weights on a grid, and adapter.kind=prompt freezes them; leave",
        ),
        (
            ["adapter.base=int4", "adapter.kind=none"],
            "adapter.base=int4: needs frozen weights, and all are trained; set adapter.kind=lora",
        ),
    ],
)
def test_where_soft_tokens_cannot_be_trained(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load("recipe=m32_prompt", "model.scale=mini", *words)


@pytest.mark.parametrize(
    "word, message",
    [
        ("recipe=m31", "recipe=m31: no such recipe, shipped are .*; did you mean m32"),
        ("recipe=gone.yaml", "recipe=gone.yaml: no such file"),
        ("recipe=mine", "did you mean mine.yaml"),
        ("recipe=" + "x" * 4000, "no such recipe"),
        ("recipe=" + "x" * 4000 + ".yaml", "cannot be read|no such file"),
    ],
    ids=["near", "file", "suffix", "long name", "long file"],
)
def test_recipes_that_are_not_there(
    word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: m32\n")
    with pytest.raises(RecipeError, match=message):
        load(word)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_at_each_of_their_scales(name: str) -> None:
    scales = [s.value for s in Scale if s is not Scale.auto]
    chain = read_chain(schema_of(Recipe), name, scales=scales)
    for scale in {scale for file in chain for scale in file.scales} or {"auto"}:
        recipe = load(f"recipe={name}", f"model.scale={scale}")
        assert (recipe.recipe, recipe.model.scale) == (name, scale)


def test_public_names() -> None:
    assert ptm.load_recipe(["recipe=m32", "model.scale=debug"]).model.scale == "debug"
    assert ptm.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'load_recip'"):
        _ = ptm.load_recip


def test_recipes_are_read_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from ptm.recipe import load_recipe; import ptm.jobs, ptm.common.agent;"
        "load_recipe(['model.scale=mini']); print('torch' in sys.modules)"
    )
    root = Path(ptm.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"


@pytest.mark.parametrize("section", ["sft", "dpo", "grpo"])
def test_a_task_that_is_not_built_in_is_refused_by_its_key(section: str):
    rule = rf"^{section}\.tasks=frist: is not one of the built-in tasks; did you mean first\?$"
    for value in ("[last,frist]", "frist"):
        with pytest.raises(RecipeError, match=rule):
            load("recipe=m32", f"{section}.tasks={value}")
    with pytest.raises(RecipeError, match=rf"^{section}\.tasks=foo: .*; choose of add, subtract"):
        load("recipe=m32", f"{section}.tasks=[foo]")

"""What to run: every section in one frozen object, loaded from a recipe, files it builds on, and
words.

    load_recipe(["recipe=m32", "train.lr=3e-4"])

Order, later wins: defaults of the classes < base recipes < the YAML file < words. In each file
the part of its `scales:` block that `model.scale` names lies over the rest of that file, so a
recipe that builds on another one overrides all of it. `model.scale=auto` becomes `full` where
an accelerator is present and `mini` where none is. A recipe is a shipped name (`m32`) or the
path of a .yaml file; `base:` is a shipped name or a .yaml file in the same folder as the file
that says it, or below.

`Recipe.check()` holds the rules between sections; whether the run fits the machine is the
planner's to say. `dump` writes the resolved recipe, which loads back equal; `difference` lists
what departs from the named one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from ptm.checkpoint.config import CheckpointConfig
from ptm.common.config import Choice, config
from ptm.common.errors import RecipeError, line
from ptm.common.parse import Given, Layer, Names, schema_of
from ptm.common.values import show
from ptm.data.config import DataConfig
from ptm.data.sft_config import SftConfig
from ptm.engine.config import EngineConfig, EngineKind
from ptm.eval.config import EvalConfig
from ptm.model.config import ModelConfig, Scale
from ptm.model.lora_config import AdapterConfig, AdapterKind
from ptm.optim.config import OptimConfig
from ptm.quant.config import QatConfig, QatGrid
from ptm.recipe_files import RecipeFile, read_chain, shipped
from ptm.trainer.config import BY_TOKEN, ObjectiveKind, TrainConfig
from ptm.trainer.metrics import LogConfig
from ptm.trainer.policy_config import DpoConfig, GrpoConfig

DEFAULT = "m32"
SCALES = [scale.value for scale in Scale if scale is not Scale.auto]


class Resume(Choice):
    """What to do with a run folder that exists already."""

    auto = "auto"
    must = "must"
    never = "never"


@config
class RunConfig:
    dir: str | None = None
    "Run folder; null is runs/NAME."
    name: str | None = None
    "Name of the run; null is the recipe's name and its scale, as in m32-mini."

    def check(self) -> None:
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            rule = "must be a plain name: letters, digits, _ . and -"
            raise RecipeError(line("name", self.name, rule, "set run.dir to choose the folder"))


@config
class Recipe:
    recipe: str = DEFAULT
    "Which recipe: the name of a shipped one, or the path of a .yaml file."
    resume: Resume = Resume.auto
    """auto: go on from the newest good checkpoint, if any; must: refuse without one; never: refuse
    a folder in use."""
    mode: ObjectiveKind = ObjectiveKind.pretrain
    """What is trained on: pretrain, the text of data.source; sft, answers in conversations; dpo,
    preferences between answers; grpo, answers that a reward scores."""
    dry_run: bool = False
    "Print the recipe, the plan and the memory table, then stop."
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    adapter: AdapterConfig = AdapterConfig()
    dpo: DpoConfig = DpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    train: TrainConfig = TrainConfig()
    qat: QatConfig = QatConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def check(self) -> None:
        """Raise RecipeError where two sections contradict each other."""
        t = self.train
        longest = self.model.max_position_embeddings
        if t.seq_len > longest:
            rule = f"must be at most model.max_position_embeddings={longest}"
            raise RecipeError(line("train.seq_len", t.seq_len, rule, "change either"))
        if t.batch_tokens % t.seq_len:
            below = t.batch_tokens // t.seq_len * t.seq_len
            rule = f"must be a multiple of train.seq_len={t.seq_len}"
            remedy = f"set train.batch_tokens={below or t.seq_len}"
            raise RecipeError(line("train.batch_tokens", t.batch_tokens, rule, remedy))
        if t.micro_batch_size * t.seq_len > t.batch_tokens:
            most = t.batch_tokens // t.seq_len
            rule = f"must be at most {most}, train.batch_tokens={t.batch_tokens} over train.seq_len"
            remedy = f"set train.micro_batch_size={most} or raise train.batch_tokens"
            raise RecipeError(line("train.micro_batch_size", t.micro_batch_size, rule, remedy))
        if self.qat.grid is not QatGrid.none and self.engine.kind is not EngineKind.paged:
            rule = f"engine.kind={self.engine.kind} does not keep weights as it needs them"
            raise RecipeError(line("qat.grid", self.qat.grid, rule, "use engine.kind=paged"))
        if self.qat.distill and t.init_from is None:
            remedy = "set train.init_from to the model to learn from"
            raise RecipeError(line("qat.distill", self.qat.distill, "has no teacher", remedy))
        rate = self.model.router_bias_update_rate
        if rate > 0 and self.engine.kind is not EngineKind.paged:
            rule = f"engine.kind={self.engine.kind} does not keep the bias in checkpoints"
            remedy = "use engine.kind=paged, or model.router_aux_loss_coef"
            raise RecipeError(line("model.router_bias_update_rate", rate, rule, remedy))
        if self.adapter.kind is not AdapterKind.none:
            self._check_adapter()
        if self.mode in BY_TOKEN:
            self._check_answers()
        if self.checkpoint.interval == 0 and self.engine.ssd_path is None:
            rule = "must be 1 or more without an engine.ssd_path, or a kill loses the run"
            raise RecipeError(line("checkpoint.interval", 0, rule, "give 100"))
        if self.checkpoint.interval == 0 and self.engine.journal_every > 1:
            rule = f"needs engine.journal_every=1 and not {self.engine.journal_every}"
            remedy = "give 100, or a stop between two commits would lose steps"
            raise RecipeError(line("checkpoint.interval", 0, rule, remedy))
        if t.warmup_steps > t.steps:
            rule = f"must be at most train.steps={t.steps}"
            remedy = f"set train.warmup_steps={t.steps // 10}"
            raise RecipeError(line("train.warmup_steps", t.warmup_steps, rule, remedy))

    def _check_answers(self) -> None:
        t, is_dpo = self.train, self.mode is ObjectiveKind.dpo
        pair, group = (2, "as a pair is two rows"), (self.grpo.group_size, "grpo.group_size")
        unit, why = pair if is_dpo else group
        if t.micro_batch_size % unit:
            rule = f"must be a multiple of {unit}, {why}"
            remedy = f"set train.micro_batch_size={max(t.micro_batch_size // unit, 1) * unit}"
            raise RecipeError(line("train.micro_batch_size", t.micro_batch_size, rule, remedy))
        if not is_dpo and self.grpo.max_new_tokens >= t.seq_len:
            rule = f"leaves no place for a prompt in rows of train.seq_len={t.seq_len}"
            key = "grpo.max_new_tokens"
            raise RecipeError(line(key, self.grpo.max_new_tokens, rule, "lower it, or raise that"))
        if self.model.router_aux_loss_coef > 0:
            rule = f"has no part in mode={self.mode}, whose loss is over answers"
            remedy = "set model.router_aux_loss_coef=0, or use model.router_bias_update_rate"
            coef = self.model.router_aux_loss_coef
            raise RecipeError(line("model.router_aux_loss_coef", coef, rule, remedy))

    def _check_adapter(self) -> None:
        if self.qat.made() is not None:
            rule = f"trains weights on a grid, and adapter.kind={self.adapter.kind} freezes them"
            raise RecipeError(line("qat.grid", self.qat.grid, rule, "leave one of them out"))
        if self.train.init_from is None:
            rule, remedy = "has no weights to change", "set train.init_from"
        elif self.adapter.has_codes and self.engine.kind is not EngineKind.paged:
            rule = f"needs pages, and engine.kind={self.engine.kind} has none"
            remedy = "use engine.kind=paged, or leave it out"
            raise RecipeError(line("adapter.base", self.adapter.base, rule, remedy))
        elif self.adapter.has_codes and self.engine.zero not in (0, 3):
            rule = f"would be whole weights in every block with engine.zero={self.engine.zero}"
            remedy = "leave engine.zero out"
            raise RecipeError(line("adapter.base", self.adapter.base, rule, remedy))
        elif self.adapter.kind is not AdapterKind.lora and self.mode is not ObjectiveKind.sft:
            rule, remedy = f"is for mode=sft and not mode={self.mode}", "use adapter.kind=lora"
        elif (
            self.adapter.kind is AdapterKind.prompt
            and self.adapter.prompt_tokens >= self.train.seq_len
        ):
            rule = f"leaves no place in rows of train.seq_len={self.train.seq_len}"
            remedy = "lower it"
            key = "adapter.prompt_tokens"
            raise RecipeError(line(key, self.adapter.prompt_tokens, rule, remedy))
        else:
            return
        raise RecipeError(line("adapter.kind", self.adapter.kind, rule, remedy))

    @property
    def name(self) -> str:
        """Name of the run."""
        scale = "" if self.model.scale is Scale.auto else f"-{self.model.scale}"
        return self.run.name or Path(self.recipe).stem + scale

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.name


R = TypeVar("R", bound=Recipe)

# Names that people know from HF's Trainer, transformers and torchtitan.
NAMES = Names(
    aliases={
        "learning_rate": "train.lr",
        "lr_scheduler_type": "train.schedule",
        "max_steps": "train.steps",
        "warmup_steps": "train.warmup_steps",
        "per_device_train_batch_size": "train.micro_batch_size",
        "max_seq_length": "train.seq_len",
        "max_grad_norm": "train.clip",
        "seed": "train.seed",
        "weight_decay": "optim.weight_decay",
        "adam_beta1": "optim.beta1",
        "adam_beta2": "optim.beta2",
        "adam_epsilon": "optim.eps",
        "save_steps": "checkpoint.interval",
        "save_total_limit": "checkpoint.keep",
        "eval_steps": "eval.interval",
        "output_dir": "run.dir",
        "run_name": "run.name",
        "model_name_or_path": "train.init_from",
        "tokenizer_name": "data.tokenizer",
        "data.path": "data.source",
        "training.steps": "train.steps",
        "training.seq_len": "train.seq_len",
        "training.seed": "train.seed",
        "training.max_norm": "train.clip",
        "training.local_batch_size": "train.micro_batch_size",
        "optimizer.lr": "train.lr",
        "optimizer.weight_decay": "optim.weight_decay",
        "lr_scheduler.warmup_steps": "train.warmup_steps",
    },
    absent={
        "gradient_accumulation_steps": "it follows from train.batch_tokens, train.seq_len, "
        "train.micro_batch_size and the number of ranks",
        "num_train_epochs": "set train.steps",
        "resume_from_checkpoint": "set resume=auto or resume=must and run.dir",
        "router_aux_loss_coef": "the attention router trains without a balance loss",
        "base": "only a recipe file can build on another; set recipe",
        "scales": "only a recipe file has scales; set model.scale",
    },
)


def load_recipe(
    words: Iterable[str],
    *,
    cls: type[R] = Recipe,  # type: ignore[assignment]
    positionals: tuple[str, ...] = (),
    has_accelerator: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> R:
    """The resolved recipe of `key=value` words; `say` is given one-line notices.

    `cls` may add keys of a verb to Recipe, which its `positionals` fill. Raises RecipeError.
    """
    say = say or (lambda notice: None)
    schema = schema_of(cls)
    notices: list[str] = []
    layer = schema.words(words, positionals=positionals, names=NAMES, notices=notices)
    name = layer["recipe"].value if "recipe" in layer else DEFAULT
    chain = read_chain(schema, name, scales=SCALES)
    scale = _scale(chain, layer, has_accelerator or _has_accelerator, notices)
    merged: Layer = {}
    for file in chain:
        merged |= file.layer | file.scales.get(scale.value, {})
    if "recipe" in layer and "recipe" in chain[-1].layer:
        del layer["recipe"]  # a recipe.yaml from a run folder keeps the name it was made from
    merged |= layer
    merged["model.scale"] = Given(scale, "")
    recipe = schema.build(merged)
    for notice in notices:
        say(notice)
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of a file with this text gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def difference(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the named recipe at the same scale, value here) where they differ."""
    words = [f"recipe={recipe.recipe}", f"model.scale={recipe.model.scale}"]
    named, here = (schema_of(Recipe).flatten(r) for r in (load_recipe(words), recipe))
    return {key: (named[key], here[key]) for key in here if named[key] != here[key]}


def describe_difference(recipe: Recipe) -> str:
    """`difference` as lines for the console."""
    rows = [f"  {k}={show(b)}  (was {show(a)})" for k, (a, b) in difference(recipe).items()]
    head = f"recipe {recipe.recipe}, scale {recipe.model.scale}"
    return "\n".join([head + (", changed:" if rows else ", unchanged"), *rows])


def _scale(
    chain: list[RecipeFile], layer: Layer, has_accelerator: Callable[[], bool], notices: list[str]
) -> Scale:
    """The scale that is asked for, `auto` resolved if the recipe has scales at all."""
    from_file = [f.layer["model.scale"].value for f in chain if "model.scale" in f.layer]
    scale = from_file[-1] if from_file else Scale.auto
    if "model.scale" in layer:
        scale = layer["model.scale"].value
    known = {Scale(name) for file in chain for name in file.scales}
    why = ""
    if scale is Scale.auto and known:
        scale, why = (
            (Scale.full, "an accelerator is present, so ")
            if has_accelerator()
            else (Scale.mini, "no accelerator is present, so ")
        )
        notices.append(f"model.scale=auto: {why}{scale}")
    if scale in known or (not known and scale in (Scale.auto, *from_file[-1:])):
        return scale
    rule = f"this recipe has only {', '.join(sorted(known))}"
    remedy = "set another scale or recipe"
    if not known:
        rule = f"this recipe has no scales, as {', '.join(_with_scales())} have"
        own = f"set it to {from_file[-1]}" if from_file else "leave it out"
        remedy = f"{own}, or take one of those"
    raise RecipeError(line("model.scale", f"{why}{scale}", rule, remedy))


def _with_scales() -> list[str]:
    """The shipped recipes that have scales, their own or of what they build on."""
    schema = schema_of(Recipe)
    chains = {name: read_chain(schema, name, scales=SCALES) for name in shipped()}
    return [name for name, chain in chains.items() if any(file.scales for file in chain)]


def _has_accelerator() -> bool:
    """Whether torch can use something better than the CPU; on Linux, no without importing torch."""
    devices = Path("/dev")
    names = ("nvidia*", "kfd", "dri/renderD*", "davinci*", "accel*", "dxg")
    if sys.platform == "linux" and not any(True for n in names for _ in devices.glob(n)):
        return False
    import torch

    return torch.accelerator.is_available()

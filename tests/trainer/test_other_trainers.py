"""Objectives against transformers and TRL: one small Llama of transformers in fp32, the same
batches, our loss over its hidden states beside theirs, loss and gradients of every weight."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptm.data.preferences import Answer, padded
from ptm.model.transformer import Transformer
from ptm.trainer.config import ObjectiveKind
from ptm.trainer.objectives import OBJECTIVES, PairBatch, preferring
from ptm.trainer.policy import advantages, grpo
from ptm.trainer.policy_config import DpoConfig
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.slow  # importing trl takes ten seconds

VOCAB, IGNORED, FILLER = 96, -100, 0
Row = tuple[list[int], list[int]]


def llama(noise: float = 0.0) -> Any:
    """The same weights in each call but for `noise` of their deviation."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra `peers`)"
    )
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return model


class Hosted:
    """Our losses over the hidden states of a Llama: `Transformer`'s own methods, with its blocks
    replaced."""

    config = tiny_config()
    loss_of, log_probs_of = Transformer.loss, Transformer.log_probs

    def __init__(self, model: Any) -> None:
        self.model, self.head_weight = model, model.lm_head.weight

    def loss(self, batch: Any) -> Any:
        self.batch = batch
        return self.loss_of(batch)  # type: ignore[arg-type, misc]

    def log_probs(self, batch: Any, **where: Any) -> Tensor:
        self.batch = batch
        return self.log_probs_of(batch, **where)  # type: ignore[arg-type, misc]

    def run(self, ids_BL: Tensor, context: Any) -> Tensor:
        return self._run(ids_BL, context)[0]

    def _run(self, ids_BL: Tensor, context: Any) -> tuple[Tensor, None]:
        documents_BL = self.batch.document_ids
        sees_BLL = (documents_BL[:, :, None] == documents_BL[:, None]).tril()
        mask_BLL = torch.zeros(sees_BLL.shape).masked_fill(~sees_BLL, torch.finfo().min)
        found = self.model.model(
            input_ids=ids_BL,
            attention_mask=mask_BLL[:, None],
            position_ids=self.batch.position_ids,
            use_cache=False,
        )
        return found.last_hidden_state, None


def rows(count: int, seed: int = 7) -> list[Row]:
    """Prompts and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()

    return [(ids(2, 8), ids(1, 9)) for _ in range(count)]


def batch_of(some: list[Row]):
    learned = [torch.tensor([False] * len(p) + [True] * len(a)).numpy() for p, a in some]
    tokens = [torch.tensor(p + a).numpy() for p, a in some]
    return padded([Answer(*pair) for pair in zip(tokens, learned)], filler_id=FILLER)


def side_by_side(some: list[Row]):
    """All of them in one row, as packing makes it: neither sees the other."""
    one = batch_of(some)
    real = one.document_ids >= 0
    ids = torch.arange(len(some))[:, None].expand_as(real)
    return type(one)(*(t[real][None] for t in one._replace(document_ids=ids)))


def assert_equal(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """The loss, and the gradient of every weight, largest difference and norm of it."""
    assert abs(float(ours.detach()) - float(theirs.detach())) <= 1e-5
    weights = list(model.parameters())
    found, wanted = (torch.autograd.grad(loss, weights) for loss in (ours, theirs))
    for mine, grad in zip(found, wanted):
        assert float((mine - grad).abs().max()) <= 1e-5
        assert float((mine - grad).norm() / grad.norm()) <= 1e-5 and float(grad.norm()) > 1e-3


@pytest.mark.parametrize("make", [batch_of, side_by_side])
def test_sft_is_what_transformers_computes(make):
    """Two micro-batches of unequal tokens; theirs with one conversation in a batch, and the tokens
    of the whole step given as num_items_in_batch, as its Trainer does."""
    model, some = llama(), rows(9)
    hosted, objective = Hosted(model), OBJECTIVES[ObjectiveKind.sft]
    losses = [objective(hosted, make(part)) for part in (some[:3], some[3:])]  # type: ignore[arg-type]
    ours = torch.stack([one.total for one in losses]).sum() / sum(one.tokens for one in losses)
    count = torch.tensor(sum(len(answer) for _, answer in some))
    theirs = torch.zeros(())
    for prompt, answer in some:
        labels = torch.tensor([[IGNORED] * len(prompt) + answer])
        ids = torch.tensor([prompt + answer])
        theirs = theirs + model(ids, labels=labels, num_items_in_batch=count).loss
    assert_equal(model, ours, theirs)


class Accelerator:
    """One process."""

    device, num_processes = "cpu", 1

    def gather(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def trl_with_head(*models: nn.Module, temperature: float = 1.0):
    """TRL, whose trainers read log-probabilities from a head that it puts on the model."""
    trl = pytest.importorskip("trl", reason="trl is not installed (extra `peers`)")
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    for model in models:
        add_fused_lm_head(model, temperature=temperature, outputs=outputs)
    return trl


@pytest.mark.parametrize("length_normalised", [False, True])
def test_dpo_is_what_trl_computes(length_normalised):
    """Theirs computes the reference itself; ours gets its log-probabilities."""
    beta, first, model = 0.4, llama(), llama(0.2)
    answers = rows(12)
    some = [(answers[i - i % 2][0], answers[i][1]) for i in range(12)]  # two to a prompt
    objective = preferring(DpoConfig(beta=beta, length_normalised=length_normalised))
    losses = []
    for part in (some[:4], some[4:]):
        batch = batch_of(part)
        with torch.no_grad():
            reference = Hosted(first).log_probs(batch)
        losses.append(objective(Hosted(model), PairBatch(batch, reference)))  # type: ignore[arg-type]
    ours = torch.stack([one.total for one in losses]).sum() / sum(one.tokens for one in losses)
    assert abs(float(ours.detach()) - 0.693) > 0.02  # of two equal models

    trl = trl_with_head(model, first)
    fake: Any = SimpleNamespace(
        model=model,
        ref_model=first,
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=beta,
        loss_types=["sigmoid_norm" if length_normalised else "sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        ld_alpha=None,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = some[0::2] + some[1::2]  # chosen first, then rejected
    width = max(len(p + a) for p, a in whole)
    inputs = {
        "input_ids": torch.tensor([p + a + [FILLER] * (width - len(p + a)) for p, a in whole]),
        "attention_mask": torch.tensor(
            [[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in whole]
        ),
        "completion_mask": torch.tensor(
            [[0] * len(p) + [1] * len(a) + [0] * (width - len(p + a)) for p, a in whole]
        ),
    }
    assert_equal(model, ours, trl.DPOTrainer._compute_loss(fake, model, inputs, False))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_grpo_is_what_trl_computes(kl_coef):
    """The same rollouts, ratios past the clip; theirs with the loss `dapo`, which ours is."""
    temperature, clip, some = 0.7, 0.2, rows(12)
    model, before, first = llama(0.05), llama(), llama(0.1)
    gains = advantages(torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 1, 1, 0.5, 0, 2]), 3)
    totals, count, clipped = [], 0, 0
    given: dict[str, list[Tensor]] = {"old": [], "ref": []}
    for start in (0, 3):  # unequal micro-batches of whole groups
        stop = 3 if start == 0 else 12
        batch = batch_of(some[start:stop])
        with torch.no_grad():
            old, reference = (
                Hosted(m).log_probs(batch, temperature=temperature) for m in (before, first)
            )
        for key, rows_BL in (("old", old), ("ref", reference)):
            given[key] += [r[m] for r, m in zip(rows_BL, batch.loss_mask)]
        found = grpo(
            Hosted(model).log_probs(batch, temperature=temperature),
            old,
            gains[start:stop],
            batch.loss_mask,
            clip=clip,
            kl_coef=kl_coef,
            reference_BL=reference if kl_coef else None,
        )
        totals.append(found.losses_BL.sum())
        count += int(batch.loss_mask.sum())
        clipped += int(found.clipped_BL.sum())
    assert 0 < clipped < count
    ours = torch.stack(totals).sum() / count

    trl = trl_with_head(model, temperature=temperature)
    fake = trl_grpo(trl, model, clip, kl_coef)
    before_width, width = (max(len(row[i]) for row in some) for i in (0, 1))

    def right(values: list, filler: float) -> Tensor:
        return torch.tensor([[*map(float, v), *[filler] * (width - len(v))] for v in values])

    inputs = {  # prompts end at one place, answers begin there
        "prompt_ids": torch.tensor([[FILLER] * (before_width - len(p)) + p for p, _ in some]),
        "prompt_mask": torch.tensor(
            [[0] * (before_width - len(p)) + [1] * len(p) for p, _ in some]
        ),
        "completion_ids": right([a for _, a in some], FILLER).long(),
        "completion_mask": right([[1] * len(a) for _, a in some], 0).long(),
        "advantages": gains,
        "old_per_token_logps": right(given["old"], 0),
        "ref_per_token_logps": right(given["ref"], 0),
        "num_items_in_batch": torch.tensor(count),
    }
    assert_equal(model, ours, trl.GRPOTrainer._compute_loss(fake, model, inputs))


def trl_grpo(trl: Any, model: nn.Module, clip: float, kl_coef: float) -> Any:
    """What GRPOTrainer._compute_loss reads of itself."""
    fake: Any = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=None,
            steps_per_generation=1,
            report_to=[],
        ),
        beta=kl_coef,
        epsilon_low=clip,
        epsilon_high=clip,
        loss_type="dapo",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        use_liger_kernel=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    name = "_get_per_token_logps_and_entropies"
    method = getattr(trl.GRPOTrainer, name)
    setattr(fake, name, lambda *a, **k: getattr(method, "__wrapped__", method)(fake, *a, **k))
    return fake

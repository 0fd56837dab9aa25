"""The loss of answers and its gradients against the formula in float64, conversation by
conversation, and what replayed text adds."""

import torch

from ptm.data.chat import ChatTemplate
from ptm.data.conversations import Conversation
from ptm.data.loader import Loader
from ptm.data.sft import Encoded, PackedRows
from ptm.data.tasks import EXACT, examples
from ptm.data.tokenizer import train_tokenizer
from ptm.trainer.config import ObjectiveKind
from ptm.trainer.objectives import OBJECTIVES, ReplayBatch, replaying
from tests.support.texts import documents
from tests.support.tiny import tiny_model


def encoded(count: int) -> list[Encoded]:
    tokenizer = train_tokenizer(iter(documents(200)), 400)
    with ChatTemplate("m32") as template:
        pairs = [
            template.encode(one.messages(), tokenizer)
            for one in examples(EXACT, count, seed=1, held_out=False)
        ]
    return [Encoded(*pair, Conversation("", [])) for pair in pairs]


def formula(model: torch.nn.Module, some: list[Encoded]) -> torch.Tensor:
    """-log p of each learned token, one conversation at a time, all logits held."""
    total = torch.zeros((), dtype=torch.float64)
    for one in some:
        ids = torch.from_numpy(one.tokens)
        log_p = torch.log_softmax(model(ids[None, :-1])[0], -1)
        picked = log_p.gather(1, ids[1:, None])[:, 0]
        total = total - picked[torch.from_numpy(one.learned[1:])].sum()
    return total


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_micro_batches_are_the_formula_over_single_conversations():
    some = encoded(24)
    exact = tiny_model(dtype=torch.float64, vocab_size=512)
    mean = formula(exact, some) / sum(one.learned[1:].sum() for one in some)
    wanted = gradients(exact, mean)

    model = tiny_model(dtype=torch.float32, vocab_size=512).train()
    rows = PackedRows(some, seq_len=96, seed=0, filler_id=0)
    loader = Loader(rows, rows_per_step=rows.num_rows, micro_batch_size=2)
    objective = OBJECTIVES[ObjectiveKind.sft]
    losses = [objective(model, batch) for batch in loader.micro_batches(0)]
    assert len(losses) > 2
    tokens = sum(int(loss.tokens) for loss in losses)
    total = torch.stack([loss.total for loss in losses]).sum() / tokens
    torch.testing.assert_close(total.double(), mean, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(model, total).items():
        error = (grad.double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert float(error) < 1e-5 or float(wanted[name].norm()) < 1e-9, (name, float(error))


def test_replayed_text_adds_its_weight_and_no_tokens():
    some = encoded(8)
    model = tiny_model(dtype=torch.float64, vocab_size=512)
    batch = PackedRows(some, seq_len=96, seed=0, filler_id=0).batch(0, 2)
    objective = replaying(OBJECTIVES[ObjectiveKind.sft])
    plain, text = objective(model, batch), objective(model, ReplayBatch(batch, 0.25))
    torch.testing.assert_close(text.total, 0.25 * plain.total)
    assert int(text.tokens) == 0 and float(text.nll_sum) == 0
    assert float(text.metrics["replay_nll"]) == float(plain.nll_sum)
    assert int(text.metrics["replay_tokens"]) == int(plain.tokens)

"""Expert maths at the edges: everything to one expert, nothing at all (T29), and against a dense
sum (T33)."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import TOLERANCE, distance, random
from tests.support.tiny import Batch, documents, packed, tiny_model


def send_all_to(model, experts: list[int]):
    """Make all scores equal but for the chosen experts', whatever the token."""

    def only(gate, args, routing):
        ids = torch.tensor(experts).expand(routing.ids_TA.shape)
        return routing._replace(ids_TA=ids, counts_E=torch.bincount(ids.flatten(), minlength=32))

    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tokens_to_one_expert(dtype):
    model = tiny_model(dtype=dtype, num_experts_per_tok=1).train()
    send_all_to(model, [7])
    loss = model.loss(packed([documents(40, 24)]))
    assert torch.isfinite(loss.nll_sum)
    loss.nll_sum.backward()
    for block in model.model.layers:
        for weight in block.mlp.experts.parameters():
            used = weight.grad.flatten(1).abs().sum(1) != 0
            assert used.nonzero().flatten().tolist() == [7]
    counts = model.take_expert_counts()
    assert counts[:, 7].tolist() == [64, 64] and counts.sum() == 128


@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (0, 0)], ids=str)
def test_no_tokens_at_all(shape):
    model = tiny_model().train()
    ids = torch.zeros(shape, dtype=torch.int64)
    loss = model.loss(Batch(ids, ids, ids.bool(), ids, ids))
    assert loss.nll_sum.item() == 0.0 and loss.tokens.item() == 0
    loss.nll_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert model.take_expert_counts().sum() == 0


def test_a_batch_of_filler_only():
    model = tiny_model().train()
    batch = packed([documents(16)])
    batch = batch._replace(
        document_ids=torch.full_like(batch.input_ids, -1),
        loss_mask=torch.zeros_like(batch.loss_mask),
    )
    loss = model.loss(batch)
    loss.nll_sum.backward()
    assert loss.nll_sum.item() == 0.0 and int(loss.tokens) == 0
    assert all(not p.grad.any() for p in model.parameters())
    assert model.take_expert_counts().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_layer_is_a_dense_sum_over_experts(dtype):
    layer = tiny_model(dtype=dtype).model.layers[0].mlp
    x = random(2, 33, 32, dtype=dtype)
    y, counts, _ = layer(x)
    routing = layer.gate(x.flatten(0, 1))
    weights = torch.zeros(66, 32, dtype=dtype).scatter(1, routing.ids_TA, routing.weights_TA)
    gate, up = torch.einsum("td,egd->teg", x.flatten(0, 1), layer.experts.w1).chunk(2, dim=-1)
    per_expert = torch.einsum("tef,edf->ted", F.silu(gate) * up, layer.experts.w2)
    expected = torch.einsum("te,ted->td", weights, per_expert).view_as(x)
    assert distance(y, expected) <= TOLERANCE[dtype]
    assert counts.sum() == 132

    wanted = [x, *layer.parameters()]
    grad = random(*y.shape, dtype=dtype, seed=1, grad=False)
    for a, b in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad)
    ):
        assert distance(a, b) <= 5 * TOLERANCE[dtype]

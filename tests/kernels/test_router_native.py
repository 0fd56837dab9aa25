"""The compiled attention router against its definition in fp64, on every instruction set here."""

import pytest
import torch

from ptm.kernels import native
from ptm.kernels.router import attention_router, attention_router_reference, top_experts
from tests.support.native import each_isa, error, needs_library, poisoned, same_bits

# T, E, A: none, one, odd numbers of experts, the published shape, all active, many experts
SHAPES = [(0, 4, 2), (1, 1, 1), (33, 5, 2), (70, 32, 2), (9, 17, 17), (5, 67, 3), (2, 512, 2)]
SCORES, GRADIENT = 1e-6, {torch.float32: 5e-6, torch.bfloat16: 2.5e-3}


def joined(T, E, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    # Halved, as in test_router_kernel.py: softmaxes of products of 10 magnify rounding alone.
    return (torch.randn(T, 3 * E, generator=draw) / 2).to(dtype).requires_grad_()


@each_isa
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("through", ["weights", "scores", "both"])
@pytest.mark.parametrize(("T", "E", "A"), SHAPES)
def test_value_and_gradient(isa, T, E, A, through, dtype):
    qkv = joined(T, E, dtype)
    wide = qkv.detach().double().requires_grad_()
    expected = attention_router_reference(*wide.chunk(3, dim=1), A)
    with native.forced(isa), poisoned():
        found = attention_router(qkv, A)
        grads = [joined(T, n, seed=n).detach()[:, :n] for n in (A, E)]
        pick = {"weights": [0], "scores": [1], "both": [0, 1]}[through]
        results = [found.weights_TA, found.scores_TE]
        grad = torch.autograd.grad([results[i] for i in pick], qkv, [grads[i] for i in pick])[0]
    assert found.weights_TA.dtype is found.scores_TE.dtype is torch.float32
    assert error(found.scores_TE, expected.scores_TE) <= SCORES
    assert torch.equal(found.ids_TA, top_experts(found.scores_TE, A))
    # The choice of the fp64 scores, but for ties closer than fp32 can tell.
    gap = expected.scores_TE.gather(1, found.ids_TA) - expected.scores_TE.gather(1, expected.ids_TA)
    assert gap.abs().max().item() <= 1e-5 if T else True
    at = expected.scores_TE.gather(1, found.ids_TA).softmax(-1)
    assert error(found.weights_TA, at) <= 3e-6
    results = [at, expected.scores_TE]
    want = torch.autograd.grad([results[i] for i in pick], wide, [grads[i].double() for i in pick])[
        0
    ]
    assert grad.dtype is dtype and error(grad, want) <= GRADIENT[dtype]


@each_isa
def test_a_bias_moves_the_choice_alone(isa):
    qkv, bias = joined(40, 9), torch.linspace(-3, 3, 9)
    with native.forced(isa):
        plain, biased = attention_router(qkv, 2), attention_router(qkv, 2, bias)
    assert torch.equal(plain.scores_TE, biased.scores_TE)
    assert torch.equal(biased.ids_TA, top_experts(biased.scores_TE + bias, 2))
    assert not torch.equal(plain.ids_TA, biased.ids_TA)
    at = biased.scores_TE.gather(1, biased.ids_TA).softmax(-1)
    assert error(biased.weights_TA, at) <= 1e-6


@each_isa
def test_ties_go_to_the_lowest_id_and_products_of_any_size_are_finite(isa):
    qkv = joined(6, 8).detach()
    qkv[:, 16:] = 0.5
    with native.forced(isa):
        tied = attention_router(qkv, 3)
        assert tied.ids_TA.tolist() == [[0, 1, 2]] * 6
        large = joined(50, 8, seed=3).detach() * 1e8
        found = attention_router(large, 2)
    expected = attention_router_reference(*large.double().chunk(3, dim=1), 2)
    assert error(found.scores_TE, expected.scores_TE) <= SCORES
    assert torch.equal(found.ids_TA, expected.ids_TA)


@each_isa
def test_a_nan_is_seen_and_ids_stay_valid(isa):
    qkv = joined(3, 8).detach()
    qkv[1, 2] = float("nan")
    with native.forced(isa):
        found = attention_router(qkv, 2)
    assert torch.equal(found.scores_TE.isnan().any(1), torch.tensor([False, True, False]))
    assert found.ids_TA.min() >= 0 and found.ids_TA.max() < 8
    assert torch.equal(found.ids_TA, top_experts(found.scores_TE, 2))


@each_isa
def test_the_same_bits_for_any_number_of_threads_and_alone(isa):
    qkv = joined(333, 32)

    def run():
        found = attention_router(qkv, 2)
        grad = torch.autograd.grad(found.weights_TA.square().sum(), qkv)[0]
        return [*found, grad]

    with native.forced(isa):
        same_bits(run)
        one = attention_router(qkv[77:78], 2)
        assert torch.equal(one.scores_TE[0], attention_router(qkv, 2).scores_TE[77])


@needs_library
def test_the_ops_keep_torchs_rules():
    qkv, scores = joined(4, 6), joined(4, 2, seed=1)
    torch.library.opcheck(torch.ops.ptm.attn_router.default, (qkv,))
    torch.library.opcheck(torch.ops.ptm.router_top.default, (scores, 2, None))
    torch.library.opcheck(torch.ops.ptm.router_top.default, (scores, 2, torch.ones(6)))
    whole = torch.compile(attention_router, fullgraph=True, backend="aot_eager")
    found = whole(qkv, 2)
    assert torch.equal(found.ids_TA, attention_router(qkv, 2).ids_TA)
    torch.autograd.grad((found.weights_TA[:, 0].sum() + found.scores_TE.sum()), qkv)

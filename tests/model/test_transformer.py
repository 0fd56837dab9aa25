"""The whole model: names, sizes, new weights, repeatability, dropout."""

import pytest
import torch

from ptm.model.config import ModelConfig, RouterKind, num_parameters
from ptm.model.init import new_weight
from ptm.model.transformer import Transformer
from tests.support.tiny import documents, packed, tiny_config, tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_the_published_model_has_the_published_size(tied):
    config = ModelConfig(tie_word_embeddings=tied)
    model = Transformer(config, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_names_are_the_published_ones():
    names = set(dict(tiny_model(num_hidden_layers=1, tie_word_embeddings=False).named_parameters()))
    layer = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate.query.weight",
        "mlp.gate.key.weight",
        "mlp.gate.value.weight",
        "mlp.experts.w1",
        "mlp.experts.w2",
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"self_attn.lf_gate.conv{i}.{x}" for i in (1, 2) for x in ("weight", "bias")),
        "self_attn.lf_gate.output_layernorm.weight",
    }
    rest = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == rest | {f"model.layers.0.{name}" for name in layer}
    assert set(tiny_model().state_dict()) == set(dict(tiny_model().named_parameters()))


def test_new_weights_follow_the_published_rule():
    config = tiny_config(hidden_size=64, attention_projection_size=128, initializer_range=0.02)
    model = Transformer(config)
    model.init_weights(0)
    for name, weight in model.named_parameters():
        spread = weight.std().item()
        if "norm" in name:
            assert (weight == 1).all()
        elif "conv" in name:
            bound = (2 * 64 if "conv1" in name else 64) ** -0.5
            assert weight.abs().max() <= bound
            assert spread == pytest.approx(bound / 3**0.5, rel=0.2)
        else:
            shrunk = name.endswith(("o_proj.weight", "experts.w2"))
            assert spread == pytest.approx(0.01 if shrunk else 0.02, rel=0.05)
            assert abs(weight.mean()) < 0.002


def test_a_new_weight_depends_on_seed_and_name_only():
    models = [tiny_model(seed, dtype=d) for seed, d in ((0, torch.float32), (0, torch.bfloat16))]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a.to(torch.bfloat16), b)
        assert torch.equal(new_weight(models[0].config, name, a.shape, 0), a)
    assert torch.equal(torch.get_rng_state(), state)
    other = tiny_model(1)
    a, b = (m.model.layers[0].self_attn for m in (models[0], other))
    assert not torch.equal(a.q_proj.weight, b.q_proj.weight)
    assert not torch.equal(a.q_proj.weight, a.k_proj.weight)


@pytest.mark.parametrize("router", RouterKind, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype, router):
    results = []
    for _ in range(2):
        model = tiny_model(dtype=dtype, router=router).train()
        loss = model.loss(packed([documents(40, 24), documents(64, seed=1)]))
        loss.nll_sum.backward()
        results.append([loss.nll_sum, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_finite_differences(tied):
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=tied).train()
    batch = packed([documents(9, 7)])
    model.loss(batch).nll_sum.backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum()
        step, sums = 1e-6, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                sums.append(model.loss(batch).nll_sum)
                parameter -= sign * step * direction
        assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(
            slope.item(), rel=1e-4, abs=1e-6
        ), name


def test_bf16_stays_near_fp32():
    batch = packed([documents(40, 24), documents(64, seed=1)])
    exact = tiny_model(initializer_range=0.05).loss(batch)
    rounded = tiny_model(initializer_range=0.05, dtype=torch.bfloat16).loss(batch)
    assert rounded.nll_sum.dtype == torch.float32
    assert rounded.nll_sum.item() == pytest.approx(exact.nll_sum.item(), rel=2e-3)


def test_dropout_works_in_training_only():
    batch = packed([documents(32)])
    model = tiny_model(attention_dropout=0.5)
    assert torch.equal(model.loss(batch).nll_sum, tiny_model().loss(batch).nll_sum)
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.loss(batch).nll_sum)
    assert losses[0] == losses[1] != losses[2]


def test_masked_labels_do_not_count():
    batch = packed([documents(32)])
    mask = batch.loss_mask.clone()
    mask[:, ::3] = False
    model = tiny_model()
    whole, part = model.loss(batch), model.loss(batch._replace(loss_mask=mask))
    rest = model.loss(batch._replace(loss_mask=~mask))
    assert int(part.tokens) == int(mask.sum()) and part.tokens.dtype == torch.int64
    assert (part.nll_sum + rest.nll_sum).item() == pytest.approx(whole.nll_sum.item(), rel=1e-6)

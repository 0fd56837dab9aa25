"""Against tensors made by running the published Hugging Face code, in every folder of tests/golden.

Tolerances are the fixtures' own: their fp32 numbers are within a fifth of them of an fp64 run.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from ptm.model.config import RopeMode
from ptm.model.context import make_context
from ptm.model.transformer import Transformer
from tests.support.golden import FOLDERS, load_model, of_ours, read
from tests.support.tiny import Batch

HIDDEN, SCORES, PROBABILITIES, LOSS, GRADIENT = 1e-4, 2e-4, 2e-5, 5e-6, 1e-4

pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)

# A rotary mode, the file of its numbers, and the base the fixtures use.
ROPE_FILES = {
    RopeMode.hf_bf16: "expected",
    RopeMode.megatron: "expected_rope_megatron",
    RopeMode.fp32: "expected_rope_fp32",
}


def near(found, expected, tolerance) -> bool:
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item() <= tolerance


def eod_of(folder) -> int:
    return json.loads((folder / "config.json").read_text())["eod_token"]


def next_token_batch(ids) -> Batch:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, ids.roll(-1, dims=1), mask, positions, torch.zeros_like(ids))


def watch(model: Transformer) -> dict[str, torch.Tensor]:
    """Record what the fixtures recorded, under their names, at the next forward."""
    seen = {}

    def keep(name, pick=lambda result: result):
        return lambda module, args, result: seen.__setitem__(name, pick(result).detach())

    model.model.embed_tokens.register_forward_hook(keep("embed"))
    model.model.norm.register_forward_hook(keep("final_norm"))
    for i, block in enumerate(model.model.layers):
        name = f"layers.{i}."
        block.register_forward_hook(keep(name + "output", lambda r: r[0]))
        block.input_layernorm.register_forward_hook(keep(name + "input_layernorm"))
        block.self_attn.register_forward_hook(keep(name + "attn_out"))
        block.self_attn.lf_gate.register_forward_hook(keep(name + "lfa"))
        post = block.post_attention_layernorm
        post.register_forward_hook(keep(name + "post_attention_layernorm", lambda r: r[0]))
        block.mlp.register_forward_hook(keep(name + "moe_out", lambda r: r[0]))
        block.mlp.gate.register_forward_hook(keep(name + "topk_indices", lambda r: r.ids_TA))
        block.mlp.gate.register_forward_hook(keep(name + "topk_weights", lambda r: r.weights_TA))
        block.mlp.gate.register_forward_hook(
            lambda gate, args, _, name=name: seen.__setitem__(
                name + "router_logits", gate.choose(*args).scores_TE
            )
        )
    return seen


@pytest.mark.parametrize("mode", ROPE_FILES, ids=str)
def test_forward_step_by_step(folder, mode):
    model, expected = load_model(folder, rope_mode=mode), read(folder, ROPE_FILES[mode])
    ids = read(folder, "inputs")["input_ids"]
    seen = watch(model)
    with torch.no_grad():
        seen["logits"] = model(ids)
    checked = 0
    for name, found in seen.items():
        if name not in expected:
            continue
        checked += 1
        found = found.view(expected[name].shape)
        if name.endswith("topk_indices"):
            assert torch.equal(found, expected[name]), name
        elif name.endswith("topk_weights"):
            assert near(found, expected[name], PROBABILITIES), name
        elif name.endswith("router_logits"):
            assert near(found, expected[name], SCORES), name
            probabilities = expected[name.replace("logits", "probs")]
            assert near(found.softmax(-1), probabilities, PROBABILITIES), name
        else:
            assert near(found, expected[name], HIDDEN), name
    assert checked == 3 + 9 * model.config.num_hidden_layers


@pytest.mark.parametrize("mode", ROPE_FILES, ids=str)
def test_loss_and_every_gradient(folder, mode):
    model, expected = load_model(folder, rope_mode=mode), read(folder, ROPE_FILES[mode])
    loss = model.train().loss(next_token_batch(read(folder, "inputs")["input_ids"]))
    mean = loss.nll_sum / loss.tokens
    assert near(mean, expected["loss"], LOSS)
    mean.backward()
    gradients = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    checked = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name and mode is not RopeMode.hf_bf16:
            continue  # the variants record these by their norms only
        gradient, found = of_ours(name, gradients, model.config), parameter.grad
        if name.endswith("embed_tokens.weight"):
            # Published code takes <eod> for padding and gives its row no look-up gradient.
            kept = torch.arange(model.config.vocab_size) != eod_of(folder)
            gradient, found = gradient[kept], found[kept]
        error = (found - gradient).norm() / gradient.norm()
        assert error <= GRADIENT, (name, error.item())
        checked += 1
    experts_left_out = 0 if mode is RopeMode.hf_bf16 else 2 * model.config.num_hidden_layers
    assert checked == len(list(model.named_parameters())) - experts_left_out


def test_masked_labels(folder):
    inputs, expected = read(folder, "inputs"), read(folder, "expected")
    labels = inputs["labels_ignored_first8"].roll(-1, dims=1)
    batch = next_token_batch(inputs["input_ids"])
    batch = batch._replace(labels=labels, loss_mask=batch.loss_mask & (labels != -100))
    loss = load_model(folder).loss(batch)
    assert near(loss.nll_sum / loss.tokens, expected["loss_labels_ignored_first8"], LOSS)


def test_float64_agrees_with_the_float64_twin(folder):
    """A hundred times closer than fp32 could be: nothing on the way is rounded to fp32."""
    model, expected = load_model(folder, dtype=torch.float64), read(folder, "expected_f64")
    with torch.no_grad():
        logits = model(read(folder, "inputs")["input_ids"])
    assert near(logits, expected["logits"], 1e-6)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_tokens(folder, use_cache):
    model, expected = load_model(folder), read(folder, "expected")
    prompt = read(folder, "inputs")["input_ids"]
    for ids, name in ((prompt, "greedy_tokens"), (prompt[:, :1], "greedy_from1_tokens")):
        new = model.generate(ids, expected[name].shape[1], use_cache=use_cache)[:, ids.shape[1] :]
        assert torch.equal(new, expected[name])


def test_logits_of_every_cached_step(folder):
    model, expected = load_model(folder), read(folder, "expected")
    prompt = read(folder, "inputs")["input_ids"]
    for ids, name in ((prompt, "greedy"), (prompt[:, :1], "greedy_from1")):
        cache = model.new_cache()
        for step, tokens in enumerate(expected[f"{name}_tokens"].unbind(1)):
            with torch.no_grad():
                logits = model(ids, cache=cache)[:, -1]
            assert near(logits, expected[f"{name}_step_logits"][:, step], HIDDEN)
            ids = tokens[:, None]


def test_cache_holds_what_the_published_cache_holds(folder):
    model, expected = load_model(folder), read(folder, "expected")
    cache = model.new_cache()
    with torch.no_grad():
        model(read(folder, "inputs")["input_ids"], cache=cache)
    for i, layer in enumerate(cache.layers):
        length = layer.length
        assert near(layer.keys[:, :, :length], expected[f"cache.{i}.key"], HIDDEN)
        assert near(layer.values[:, :, :length], expected[f"cache.{i}.value"], HIDDEN)
        assert near(layer.recent_B2D, expected[f"cache.{i}.lfa_hidden"], HIDDEN)


# Packed documents. The published code cuts attention at most, never the localized filter.


def documents_of(ids, eod: int):
    """An <eod> closes the document it is in."""
    return (ids == eod).long().cumsum(1) - (ids == eod).long()


def test_documents_as_megatron_has_them(folder):
    """Positions start again, attention does not; the loss masks are Megatron's own."""
    packed, model = read(folder, "expected_packed"), load_model(folder, isolate_documents=False)
    ids, labels = packed["megatron_tokens"], packed["megatron_labels"]
    documents = documents_of(ids, eod_of(folder))
    context = make_context(model.config, ids, document_ids_BL=documents)
    assert context.see_BLS is None and context.connected_BL is None
    positions = packed["megatron_position_ids"]
    explicit = make_context(model.config, ids, position_ids_BL=positions)
    assert torch.equal(context.cos_BLR, explicit.cos_BLR)

    with torch.no_grad():
        logits = model(ids)
    assert near(logits, packed["logits.no_reset"][:, :-1], HIDDEN)
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert near(nll, packed["token_nll.no_reset"], HIDDEN)
    for stage in ("sft0", "sft1"):
        mask = packed[f"megatron_loss_mask.{stage}"].bool()
        loss = model.loss(Batch(ids, labels, mask, torch.arange(ids.shape[1]).expand_as(ids), None))
        assert near(loss.nll_sum / loss.tokens, packed[f"megatron_loss.{stage}"], LOSS)


def test_documents_as_hugging_face_has_them(folder):
    """Attention is cut at documents, positions and the localized filter run on."""
    packed, model = read(folder, "expected_packed"), load_model(folder)
    ids = read(folder, "inputs")["input_ids_packed"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    documents = documents_of(ids, eod_of(folder))
    context = make_context(model.config, ids, position_ids_BL=positions, document_ids_BL=documents)
    assert torch.equal(context.see_BLS, packed["keep_mask.train_resetattn1_resetpos0"][:, 0].bool())
    with torch.no_grad():
        x = model.run(ids, context._replace(connected_BL=None))
    for name in ("train_resetattn1_resetpos0", "train_resetattn1_resetpos1"):
        assert near(F.linear(x, model.head_weight), packed[f"logits.{name}"], HIDDEN)

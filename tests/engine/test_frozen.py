"""Frozen weights: no gradient, no states, the same updates of the rest."""

import pytest
import torch

from ptm.data.pack import with_soft
from ptm.engine.layout import Format, Named, PageMap, make_layout
from ptm.model.adapter import SOFT_TOKENS
from ptm.model.lora_config import AdapterConfig, AdapterKind
from tests.support.mesh import mesh_of_test
from tests.support.paged import batch, make_engine
from tests.support.ranks import run_ranks

FMT = Format(weight_bytes=2, is_split=True, is_int8=False)


def test_frozen_weights_have_pages_of_weights_only():
    units = [
        ("root", [Named("e", (512, 64), False, True)]),
        ("a", [Named("w", (256, 256), False, True), Named("lora", (8, 256), False)]),
    ]
    layout = make_layout(units, world=1, ep=1, rank=0)
    assert layout.trained == 8 * 256 and layout.numel == 512 * 64 + 256 * 256 + 8 * 256
    assert [g.is_frozen for g in layout.units[1].groups] == [False, True]
    pages = PageMap(layout.numel, 1 << 20, FMT, trained=layout.trained)
    everything = PageMap(layout.numel, 1 << 20, FMT)
    assert pages.states.num_pages == 1 and pages.grads.num_pages == 1
    assert pages.used_bytes == layout.numel * 2 + layout.trained * 14
    assert everything.used_bytes > 4 * pages.used_bytes


@pytest.mark.parametrize("world, zero, dtype", [(1, 1, torch.float32), (2, 3, torch.bfloat16)])
def test_soft_tokens_learn_and_no_byte_of_the_base_changes(
    world: int, zero: int, dtype: torch.dtype
) -> None:
    run_ranks(world, learn, zero, dtype)


def learn(rank: int, world: int, zero: int, dtype: torch.dtype) -> None:
    prompt = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=4)
    engine = make_engine(mesh_of_test(rank, world), zero=zero, dtype=dtype, adapter=prompt)
    model, rows = engine.model, with_soft(batch(0), 4)

    seen: dict[str, bytes] = {}

    def look(prefix: str, module: torch.nn.Module) -> None:
        """Bytes of the frozen weights that a forward reads, while they are gathered."""
        for name, p in module.named_parameters():
            if not p.requires_grad:
                seen[f"{prefix}.{name}"] = p.detach().view(torch.uint8).numpy().tobytes()

    def frozen() -> dict[str, bytes]:
        seen.clear()
        parts = {"embedding": model.model.embed_tokens, "norm": model.model.norm}
        hooks = [
            model.model.norm.register_forward_pre_hook(
                lambda *_: [look(name, part) for name, part in parts.items()] and None
            )
        ]
        hooks += [
            block.register_forward_pre_hook(lambda block, _, i=i: look(str(i), block))
            for i, block in enumerate(model.model.layers)
        ]
        seen["logits"] = model(batch(0).input_ids).detach().view(torch.uint8).numpy().tobytes()
        for hook in hooks:
            hook.remove()
        return dict(seen)

    before, losses = frozen(), []
    assert len(before) == len(list(model.named_parameters()))  # logits, not soft tokens
    for _ in range(10):
        loss = model.loss(rows)
        losses.append(float(loss.nll_sum.detach()))
        engine.backward(loss.total, is_last=True, tokens=loss.tokens, lr=3e-2)
        engine.step(nll_sum=loss.nll_sum.detach(), tokens=loss.tokens, lr=3e-2, flags=[])
    engine.drain()
    assert losses[-1] < 0.98 * losses[0]
    assert frozen() == before
    states = {"model.", "optim.exp_avg.", "optim.exp_avg_sq."}
    assert set(engine.state()) == {state + SOFT_TOKENS for state in states}
    engine.close()

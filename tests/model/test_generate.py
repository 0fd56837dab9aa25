"""Generation: with and without the cache, in any pieces, padded, sampled."""

import pytest
import torch

from ptm.common.errors import RecipeError
from ptm.model.generate import pick, recorded_routes
from tests.support.compare import distance
from tests.support.tiny import Batch, documents, packed, tiny_model


def prompt(B: int = 3, L: int = 17):
    return torch.randint(96, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [1, 23], [2, 3, 19], [17, 1, 1, 5]], ids=str)
def test_a_cache_may_be_fed_in_any_pieces(pieces):
    model, ids = tiny_model(), prompt(L=24)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
        assert distance(torch.cat(parts, dim=1), model(ids)) <= 1e-5
    assert cache.length == 24


def test_documents_and_padding_go_on_through_the_cache():
    model = tiny_model()
    rows = [documents(9, 11, 10, seed=1), documents(20, 4, 6, seed=2)]
    batch = packed(rows)
    documents_BL = batch.document_ids.masked_fill(batch.document_ids == 0, -1)  # filler in front
    cache = model.new_cache()
    with torch.no_grad():
        parts = [
            model(ids, document_ids_BL=docs, cache=cache)
            for ids, docs in zip(batch.input_ids.split(7, 1), documents_BL.split(7, 1))
        ]
        whole = model(batch.input_ids, document_ids_BL=documents_BL)
    real = documents_BL >= 0
    assert distance(torch.cat(parts, dim=1)[real], whole[real]) <= 1e-5


def test_cached_and_uncached_agree():
    model = tiny_model()
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        cached = model.generate(prompt(), 12, **options)
        assert torch.equal(cached, model.generate(prompt(), 12, use_cache=False, **options))
        assert cached.shape == (3, 29) and torch.equal(cached[:, :17], prompt())


def test_left_padding_does_not_change_the_continuation():
    model = tiny_model()
    ids = prompt(B=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for use_cache in (True, False):
        both = model.generate(ids, 10, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(both[:1], model.generate(ids[:1], 10))
        assert torch.equal(both[1:, 6:], model.generate(ids[1:, 6:], 10))


def test_a_row_that_has_ended_stays_so_and_the_last_one_stops_all():
    model, ids = tiny_model(), prompt()
    options = {"temperature": 1.0, "seed": 6}
    free = model.generate(ids, 12, **options)[:, 17:]
    eos = int(free[0, 2])
    assert not (free[:, :2] == eos).any() and not (free[1:] == eos).all(dim=0).any()
    stopped = model.generate(ids, 12, eos_id=eos, **options)[:, 17:]
    assert torch.equal(stopped[0, :3], free[0, :3]) and (stopped[0, 3:] == eos).all()
    assert stopped.shape[1] == 12 and (free[0, 3:] != eos).any()
    greedy = model.generate(ids[:1], 12)[:, 17:]
    first = int(greedy[0, 4])
    short = model.generate(ids[:1], 12, eos_id=first)[:, 17:]
    assert short.shape[1] == greedy[0].tolist().index(first) + 1
    assert torch.equal(short[0], greedy[0, : short.shape[1]])


def test_a_seed_means_the_same_draws_and_leaves_torch_alone():
    model = tiny_model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draws = [model.generate(prompt(), 8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_what_it_generates_and_keeps_the_mode():
    model = tiny_model().train()
    tokens = list(model.stream(prompt(), 5))
    assert model.training and model.take_expert_counts().sum() == 0
    assert torch.equal(torch.stack(tokens, dim=1), model.generate(prompt(), 5)[:, 17:])
    assert not tokens[0].requires_grad


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for top_p, kept in (
        (1e-6, {0}),
        (0.5, {0}),
        (0.51, {0, 1}),
        (0.9, {0, 1, 2}),
        (1.0, {0, 1, 2, 3}),
    ):
        drawn = pick(logits, temperature=1.0, top_p=top_p, draws_B=draws)
        assert set(drawn.tolist()) == kept
    share = (pick(logits, temperature=0.5, top_p=1.0, draws_B=draws) == 0).float().mean()
    assert abs(share - 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)) < 1e-3


def _ragged(side: str):
    """Three prompts of 5, 9 and 2 tokens, padded to 9 on one side, and the bare ones."""
    rows = [prompt(B=1, L=n)[0] for n in (5, 9, 2)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        ids[i, place], mask[i, place] = row, 1
    return rows, ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_its_rows_give_one_by_one(side):
    model = tiny_model()
    rows, ids, mask = _ragged(side)
    seeds = [11, 7, 23]
    options = {"temperature": 1.0, "top_p": 0.95}
    both = list(model.steps(ids, 10, attention_mask=mask, seed=seeds, **options))
    for i, row in enumerate(rows):
        one = list(model.steps(row[None], 10, seed=seeds[i : i + 1], **options))
        assert [int(p.ids_B[i]) for p in both] == [int(p.ids_B[0]) for p in one]
        found = torch.stack([p.log_probs_B[i] for p in both])
        assert distance(found, torch.stack([p.log_probs_B[0] for p in one])) <= 1e-5


def test_ranks_go_on_until_all_have_ended():
    model, ids = tiny_model(), prompt()
    first = int(model.generate(ids[:1], 1)[0, -1])
    asked = []

    def other_ends_after(count):
        return lambda is_going_on: asked.append(is_going_on) or len(asked) < count

    tokens = list(model.stream(ids[:1], 9, eos_id=first, agree=other_ends_after(4)))
    assert [int(t) for t in tokens] == [first] * 4 and asked == [False] * 4


@pytest.mark.parametrize("router", ["attention", "linear", "shared_expert"])
def test_log_probs_of_the_update_are_those_of_the_rollout_under_its_routes(router):
    changes = {"router": router}
    model = tiny_model(**changes)
    rows, ids, mask = _ragged("left")
    with recorded_routes(model) as routes:
        picked = list(model.steps(ids, 6, temperature=0.7, attention_mask=mask, seed=3))
    new = torch.stack([p.ids_B for p in picked], dim=1)
    routes_BLNA = torch.stack(
        [torch.cat([part.view(3, -1, part.shape[1]) for part in layer], dim=1) for layer in routes],
        dim=2,
    )
    whole = torch.cat([ids, new], dim=1)
    docs = torch.cat([mask - 1, torch.zeros_like(new)], dim=1)
    counted = torch.zeros_like(whole[:, 1:], dtype=torch.bool)
    counted[:, 8:] = True
    positions = (docs[:, :-1] == 0).long().cumsum(1).sub(1).clamp(min=0)
    batch = Batch(whole[:, :-1], whole[:, 1:], counted, positions, docs[:, :-1])
    found = model.log_probs(batch, temperature=0.7, routes_BLNA=routes_BLNA)
    assert distance(found[:, 8:], torch.stack([p.log_probs_B for p in picked], dim=1)) <= 1e-5
    assert (found[:, :8] == 0).all()
    assert distance(found, model.log_probs(batch, temperature=0.7)) <= 1e-5  # no choice differs
    other = (routes_BLNA + 1) % (31 if router == "shared_expert" else 32)
    if router == "shared_expert":
        other[..., -1] = routes_BLNA[..., -1]
    moved = model.log_probs(batch, temperature=0.7, routes_BLNA=other)
    assert distance(moved[:, 8:], found[:, 8:]) > 1e-2  # routes that are given are used
    moved.sum().backward()
    gate = model.model.layers[0].mlp.gate
    grads = [p.grad for p in gate.parameters()]
    assert (
        all(g is not None and torch.isfinite(g).all() for g in grads) and grads[0].abs().sum() > 0
    )


@pytest.mark.parametrize("wrong", [96, -1])
def test_tokens_that_the_model_does_not_have_are_one_line(wrong: int) -> None:
    model, ids = tiny_model(), prompt(B=2, L=5)
    ids[1, 3] = wrong
    rule = f"^input_ids={wrong}: must be at least 0 and at most 95, the model's last token; use "
    for ask in (model, lambda ids: model.generate(ids, 2), lambda ids: model.stream(ids, 2)):
        with pytest.raises(RecipeError, match=rule):
            ask(ids)


def test_more_tokens_than_positions_are_warned_of_once_and_before_the_first(caplog) -> None:
    model, ids = tiny_model(max_position_embeddings=8), prompt(B=1, L=5)
    model.generate(ids, 4)
    assert not caplog.records
    steps = model.stream(ids, 6)
    rule = "behind a prompt of 5 tokens they may pass max_position_embeddings=8, the longest "
    assert [r.getMessage()[:92] for r in caplog.records] == [f"max_new_tokens=6: {rule}"[:92]]
    assert len(list(steps)) == 6 and len(caplog.records) == 1

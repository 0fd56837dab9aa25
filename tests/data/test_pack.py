"""Packed rows against the published masks and positions, and against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ptm.data.pack import pack, sft_loss_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
EOD, SEP = 5, 7  # of the fixture

ROWS = st.lists(
    st.lists(st.sampled_from([EOD, SEP, 1, 2]), min_size=9, max_size=9), min_size=0, max_size=4
)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected_packed.safetensors")


def test_not_isolated_is_megatron(golden: dict[str, torch.Tensor]) -> None:
    rows = load_file(GOLDEN / "inputs.safetensors")["input_ids_packed"].numpy()
    batch = pack(rows, eod_id=EOD, isolate_documents=False)
    assert torch.equal(batch.input_ids, golden["megatron_tokens"])
    assert torch.equal(batch.labels, golden["megatron_labels"])
    assert torch.equal(batch.position_ids, golden["megatron_position_ids"])
    assert torch.equal(batch.loss_mask, golden["megatron_loss_mask.sft0"].bool())
    assert batch.loss_mask.dtype == torch.bool


def test_sft_mask_is_megatron(golden: dict[str, torch.Tensor]) -> None:
    expected = golden["megatron_loss_mask.sft1"].bool().numpy()
    assert 0 < expected.sum() < expected.size
    mask = sft_loss_mask(golden["megatron_labels"].numpy(), eod_id=EOD, sep_id=SEP)
    np.testing.assert_array_equal(mask, expected)


def test_positions_are_those_of_the_published_masks(golden: dict[str, torch.Tensor]) -> None:
    """HF's block-diagonal mask lets a token see exactly its own document, by our document ids."""
    rows = load_file(GOLDEN / "inputs.safetensors")["input_ids_packed"].numpy()
    more = np.concatenate([rows, rows[:, :1]], axis=1)  # HF takes all 33 tokens as inputs
    ids = pack(more, eod_id=EOD, isolate_documents=True).document_ids
    sees = (ids[:, :, None] == ids[:, None, :]).tril()
    kept = golden["keep_mask.train_resetattn1_resetpos1"][:, 0].bool()
    assert torch.equal(sees, kept)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 1]),  # no <eod>: nothing is masked
        ([1, SEP, 3, 4], [1, 1, 1, 1]),
        ([1, SEP, 3, EOD], [0, 1, 1, 1]),  # the <sep> and the <eod> count
        ([1, SEP, 3, SEP, EOD], [0, 1, 1, 1, 1]),  # up to the first <sep>
        ([1, 2, EOD, 1], [1, 1, 1, 1]),  # a part without <sep> counts whole
        ([1, SEP, EOD, 1, SEP, 2], [0, 1, 1, 1, 1, 1]),  # one <eod>: its tail is never masked
        ([1, SEP, EOD, 1, SEP, EOD, 1, SEP, 2], [0, 1, 1, 0, 1, 1, 0, 1, 1]),
        ([EOD, EOD, 1, 2], [1, 1, 1, 1]),
        ([1, EOD, EOD, 1, SEP], [1, 1, 1, 0, 1]),
    ],
)
def test_sft_mask_by_hand(labels: list[int], expected: list[int]) -> None:
    mask = sft_loss_mask(np.array([labels]), eod_id=EOD, sep_id=SEP)
    assert mask[0].astype(int).tolist() == expected


@given(ROWS, st.booleans())
@settings(deadline=None)
def test_pack_equals_a_loop(rows: list[list[int]], is_isolated: bool) -> None:
    batch = pack(
        np.array(rows, np.uint16).reshape(-1, 9), eod_id=EOD, isolate_documents=is_isolated
    )
    assert all(part.shape == (len(rows), 8) for part in batch)
    for b, row in enumerate(rows):
        document = position = 0
        for i in range(8):
            assert batch.input_ids[b, i] == row[i] and batch.labels[b, i] == row[i + 1]
            assert batch.document_ids[b, i] == document and batch.position_ids[b, i] == position
            assert bool(batch.loss_mask[b, i]) == (not is_isolated or row[i] != EOD)
            position += 1
            if row[i] == EOD:
                document, position = document + 1, 0
    assert all(part.dtype == torch.int64 for part in batch if part is not batch.loss_mask)

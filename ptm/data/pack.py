"""Rows of tokens become what the model and the loss read.

A row is L + 1 tokens cut from a stream of documents that each end with <eod>; it may begin and end
in the middle of one. Inputs are its first L tokens, labels its last L:

    tokens         a b E c d e E f g        E = <eod>, L = 8
    input_ids      a b E c d e E f
    labels         b E c d e E f g
    document_ids   0 0 0 1 1 1 1 2
    position_ids   0 1 2 0 1 2 3 0          restart after each <eod>; the <eod> keeps the old count
    loss_mask      1 1 0 1 1 1 0 1          isolated: the label after an <eod> is another document's
                   1 1 1 1 1 1 1 1          not isolated: as Megatron trained M32

Positions are the same either way. With `isolate_documents` the model must also keep attention
within a document (it reads document_ids); without, the documents of a row see each other, as M32's
did in training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """B packed rows of L positions; B may be 0. int64, loss_mask bool."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """Already shifted: labels[b, i] follows input_ids[b, i]."""
    loss_mask: torch.Tensor
    """Which labels count."""
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    """Number of the document within its row, from 0."""


def pack(tokens: np.ndarray, *, eod_id: int, isolate_documents: bool) -> Batch:
    """Make a batch of rows, (B, L + 1) of any integer type."""
    tokens = np.ascontiguousarray(tokens, np.int64)
    inputs = tokens[:, :-1]
    ends = inputs == eod_id
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    index = np.arange(inputs.shape[1])
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    mask = ~ends if isolate_documents else np.ones_like(ends)
    parts = (inputs, tokens[:, 1:], mask, positions, np.cumsum(starts, axis=1))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def with_soft(batch: Batch, num_soft: int) -> Batch:
    """`batch` with ids -1 to -num_soft before each document, whose positions they begin. The same
    labels count. Rows grow by the most that one has; what others lack at the end is filler."""
    documents = batch.document_ids
    if not num_soft or not documents.numel():
        return batch
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = torch.arange(documents.shape[1]) + num_soft * starts.cumsum(1)
    length = documents.shape[1] + num_soft * int(starts.sum(1).max())
    fresh = [torch.full((len(documents), length), 0, dtype=part.dtype) for part in batch]
    made = Batch(*fresh)
    made.document_ids.fill_(-1)
    rows, columns = starts.nonzero(as_tuple=True)
    for i in range(num_soft):
        at = rows, index[rows, columns] - num_soft + i
        made.input_ids[at] = -1 - i
        made.position_ids[at] = i
        made.document_ids[at] = documents[rows, columns]
    shifted = batch._replace(position_ids=batch.position_ids + num_soft)
    for whole, part in zip(made, shifted):
        whole.scatter_(1, index, part)
    return made


def sft_loss_mask(labels_BL: np.ndarray, *, eod_id: int, sep_id: int) -> np.ndarray:
    """Megatron's `--sft-stage` mask of labels (B, L), bool: answers count, questions do not.

    Between two <eod> (and before the first) labels up to the first <sep> are left out; the <sep>
    and the <eod> count. A part without <sep> counts whole. The part after the last <eod> is treated
    so only where a row has two <eod> or more: with one its question counts, as M32 was trained.
    """
    mask = np.ones(labels_BL.shape, bool)
    for row, labels in zip(mask, labels_BL):
        ends = np.flatnonzero(labels == eod_id)
        if not len(ends):
            continue
        bounds = [-1, *ends, *([len(labels)] if len(ends) > 1 else [])]
        for before, end in zip(bounds, bounds[1:]):
            seps = np.flatnonzero(labels[before + 1 : end] == sep_id)
            if len(seps):
                row[before + 1 : before + 1 + seps[0]] = False
    return mask

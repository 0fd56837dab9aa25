"""A mixture of SwiGLU experts over the rows that a router sends to them, in one op:

    y_t = sum over a of weights_ta (silu(x_t G_e^T) * (x_t U_e^T)) W2_e^T,  e = ids_ta, w1 = [G ; U]

Rows are gathered, multiplied, weighted and added up without a padded row outside of the op. The
kernel (csrc/moe_mlp: bf16, D and F multiples of 32, on a GPU up to 512 experts) keeps the rows of
the first product for the backward, without padding, and nothing else: the router's weights get
their gradient from <dy W2, h>, so what an expert returned is never needed again (SonicMoE, arXiv
2512.14080). Other types and sizes take the reference: rows moved to aligned groups (permute.py),
experts one after another or torch's grouped GEMM (grouped_gemm.py), rows added up.

A step of autograd that has rows of its own (ptm/parallel/expert.py) calls `forward_rows` and
`backward_rows`; one whose rows lie where ranks share memory (ptm/parallel/in_memory.py) the same
`_in_place`, with the kernel only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptm.kernels import native
from ptm.kernels.grouped_gemm import backward_groups, forward_groups, swiglu_experts
from ptm.kernels.permute import aligned, combine, grouped_rows, permute, slots
from ptm.kernels.sink import put, rooms_of, sinks_of

native.declare("moe_plan", "moe_mlp")

CUDA_EXPERTS = 512  # MAX_E of csrc/moe_plan/plan.h


def moe_mlp(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor | None,
    counts_E: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """Each row through its experts, weighted and added up. Without weights rows have one expert
    each (A = 1) and come back as it makes them.

    Shapes: x (T, D), ids (T, A) int64, weights (T, A) fp32, counts (E,) rows of each, w1
    (E, 2F, D) gate rows first, w2 (E, D, F) -> (T, D). An idle expert's gradient is zeros.
    """
    if not _serves(x_TD, w1_EGD, w2_EDF):
        return moe_mlp_reference(x_TD, ids_TA, weights_TA, counts_E, w1_EGD, w2_EDF)
    order, starts = torch.ops.ptm.moe_plan(ids_TA, len(w1_EGD))
    inputs = (x_TD, w1_EGD, w2_EDF) if weights_TA is None else (x_TD, weights_TA, w1_EGD, w2_EDF)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    weights_TA = None if weights_TA is None else weights_TA.float()
    return torch.ops.ptm.moe_mlp(x_TD, weights_TA, w1_EGD, w2_EDF, order, starts, keep)[0]


def moe_mlp_reference(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor | None,
    counts_E: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """The same by rows moved to groups and back."""
    slots_TA = slots(ids_TA, counts_E)
    x_RD = permute(x_TD, slots_TA, grouped_rows(slots_TA.numel(), counts_E.numel()))
    y_RD = swiglu_experts(x_RD, w1_EGD, w2_EDF, counts_E)
    if weights_TA is None:
        return y_RD.index_select(0, slots_TA.flatten())
    return combine(y_RD, slots_TA, weights_TA)


class Kept(NamedTuple):
    """What `backward_rows` wants from `forward_rows`: of the kernel x (Q, D), hidden (Q, 2F, in an
    order of its own), order and starts; of the reference x and hidden in groups, slots and where
    the groups end."""

    x: Tensor
    hidden: Tensor
    order: Tensor
    ends: Tensor


def forward_rows(
    x_QD: Tensor, ids_Q: Tensor, counts_E: Tensor, w1_EGD: Tensor, w2_EDF: Tensor
) -> tuple[Tensor, Kept]:
    """Each row through its one expert, without autograd: (Q, D), and what the backward wants."""
    if _serves(x_QD, w1_EGD, w2_EDF):
        order, starts = torch.ops.ptm.moe_plan(ids_Q[:, None], len(w1_EGD))
        y, hidden = torch.ops.ptm.moe_mlp(x_QD, None, w1_EGD, w2_EDF, order, starts, True)
        return y, Kept(x_QD, hidden, order, starts)
    slots_Q, ends_E = slots(ids_Q[:, None], counts_E).flatten(), aligned(counts_E).cumsum(0)
    ends = ends_E.tolist()
    x_RD = x_QD.new_zeros(ends[-1], x_QD.shape[1]).index_copy_(0, slots_Q, x_QD)
    y_RD, hidden = forward_groups(x_RD, w1_EGD, w2_EDF, ends)
    return y_RD.index_select(0, slots_Q), Kept(x_RD, hidden, slots_Q, ends_E)


def backward_rows(
    grad_QD: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    kept: Kept,
    *,
    into: tuple[Tensor, Tensor],
    adds: bool = False,
) -> Tensor:
    """Gradient of the rows, (Q, D); those of w1 and w2 are written over `into`, or added to it. The
    kernel alone adds, and takes fp32 there for weights of bf16."""
    if _serves(grad_QD, w1_EGD, w2_EDF):
        by_x = torch.empty_like(grad_QD, memory_format=torch.contiguous_format)
        _call_backward(grad_QD, kept.x, None, w1_EGD, w2_EDF, *kept[2:], kept.hidden,
                       None, by_x, None, *into, adds=adds)  # fmt: skip
        return by_x
    assert not adds
    grad_RD = torch.zeros_like(kept.x).index_copy_(0, kept.order, grad_QD)
    ends = kept.ends.tolist()
    by_x = backward_groups(grad_RD, kept.x, w1_EGD, w2_EDF, kept.hidden, ends, into=into)
    return by_x.index_select(0, kept.order)


def plan_windows(
    ids_WS: Tensor, used_W: Tensor, experts: slice, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Numbers w x S + s of the rows of `experts`, by expert, window w and place s within it, and
    where each expert's begin, (e + 1,). used (W,): ids of each window that are there."""
    num_local = experts.stop - experts.start
    order = ids_WS.new_empty(int(used_W.sum()))
    starts = ids_WS.new_empty(num_local + 1)
    native.call("moe_plan_windows", ids_WS, used_W, order, starts, *ids_WS.shape,
                experts.start, num_local, num_experts)  # fmt: skip
    return order[: int(starts[-1])], starts


def forward_in_place(
    x_MD: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    order_Q: Tensor,
    starts: Tensor,
    *,
    to_ND: Tensor,
    keep: bool,
) -> Tensor:
    """Row n of the order from row n // A of x to row n of `to`, A = N / M. Returns what the
    backward wants, (Q, 2F), or nothing."""
    M, D = x_MD.shape
    hidden = x_MD.new_empty(len(order_Q) if keep else 0, w1_EGD.shape[1])
    native.call("moe_mlp", x_MD, None, w1_EGD.contiguous(), w2_EDF.contiguous(), order_Q, starts,
                None, to_ND, hidden if keep else None, M, len(to_ND) // M, D, w2_EDF.shape[2],
                len(w1_EGD))  # fmt: skip
    return hidden


def backward_in_place(
    x_MD: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    order_Q: Tensor,
    starts: Tensor,
    hidden: Tensor,
    *,
    rows_ND: Tensor,
    into: tuple[Tensor, ...] | None,
    adds: bool = False,
) -> None:
    """rows: row n of the order holds what it returned, and takes the gradient of row n // A of x.
    into: as in `backward_rows`; None for experts that need none."""
    by_w = (None, None) if into is None else into
    _call_backward(rows_ND, x_MD, None, w1_EGD, w2_EDF, order_Q, starts, hidden, None, rows_ND,
                   None, *by_w, adds=adds, active=len(rows_ND) // len(x_MD))  # fmt: skip


def puts_gradients(x_QD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor) -> bool:
    """Whether `backward_rows` takes the rooms of a sink."""
    return _serves(x_QD, w1_EGD, w2_EDF)


def fits(dtype: torch.dtype, D: int, F: int) -> bool:
    """Whether the kernel serves experts of these sizes on the CPU."""
    return _takes(dtype, D, F) and native.has("moe_mlp")


def _takes(dtype: torch.dtype, D: int, F: int) -> bool:
    return dtype is torch.bfloat16 and D % 32 == 0 and F % 32 == 0


def _serves(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    has_plan = x.device.type == "cpu" or len(w1) <= CUDA_EXPERTS
    return has_plan and _takes(x.dtype, *w2.shape[1:]) and native.serves("moe_mlp", x, w1, w2)


torch.library.define("ptm::moe_plan", "(Tensor ids, SymInt num_experts) -> (Tensor, Tensor)")
torch.library.define(
    "ptm::moe_mlp",
    "(Tensor x, Tensor? weights, Tensor w1, Tensor w2, Tensor order, Tensor starts, bool keep)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "ptm::moe_mlp_backward",
    "(Tensor grad, Tensor x, Tensor? weights, Tensor w1, Tensor w2, Tensor order, Tensor starts,"
    " Tensor hidden, bool by_experts) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("ptm::moe_plan", native.DEVICES)
def _plan(ids: Tensor, num_experts: int):
    order, starts = _plan_like(ids, num_experts)
    native.call("moe_plan", ids.contiguous(), order, starts, ids.numel(), num_experts)
    return order, starts


@torch.library.register_fake("ptm::moe_plan")
def _plan_like(ids: Tensor, num_experts: int):
    return ids.new_empty(ids.numel()), ids.new_empty(num_experts + 1)


@torch.library.impl("ptm::moe_mlp", native.DEVICES)
def _forward(x, weights, w1, w2, order, starts, keep: bool):
    y, hidden = _forward_like(x, weights, w1, w2, order, starts, keep)
    active = 1 if weights is None else weights.shape[1]
    rows = None if weights is None else x.new_empty(len(order), x.shape[1])
    weights = None if weights is None else weights.contiguous()
    native.call("moe_mlp", x.contiguous(), weights, w1.contiguous(), w2.contiguous(), order,
                starts, rows, y, hidden if keep else None, len(x), active, x.shape[1],
                w2.shape[2], len(w1))  # fmt: skip
    return y, hidden


@torch.library.register_fake("ptm::moe_mlp")
def _forward_like(x, weights, w1, w2, order, starts, keep: bool):
    hidden = x.new_empty(order.shape[0] if keep else 0, w1.shape[1])
    return torch.empty_like(x, memory_format=torch.contiguous_format), hidden


@torch.library.impl("ptm::moe_mlp_backward", native.DEVICES)
def _backward(grad, x, weights, w1, w2, order, starts, hidden, by_experts: bool):
    by = _gradients(grad, x, weights, w1, w2, order, starts, hidden, by_experts)
    by_x, by_weights, *by_w = by
    rows = None if weights is None else x.new_empty(len(order), x.shape[1])
    _call_backward(grad, x, weights, w1, w2, order, starts, hidden, rows, by_x,
                   None if weights is None else by_weights,
                   *(by_w if by_experts else (None, None)))  # fmt: skip
    return by


def _call_backward(
    grad, x, weights, w1, w2, order, starts, hidden, *outputs: Tensor | None, adds: bool = False,
    active: int = 1,
) -> None:  # fmt: skip
    """outputs: rows, and the gradients of x, weights, w1 and w2. active: rows of grad to one of x,
    where there are no weights."""
    active = active if weights is None else weights.shape[1]
    weights = None if weights is None else weights.contiguous()
    is_exact = outputs[3] is not None and outputs[3].dtype is torch.float32
    native.call("moe_mlp_backward", grad.contiguous(), x.contiguous(), weights, w1.contiguous(),
                w2.contiguous(), order, starts, hidden, *outputs, is_exact + adds, len(x), active,
                x.shape[1], w2.shape[2], len(w1), 1 if weights is None else active)  # fmt: skip


@torch.library.register_fake("ptm::moe_mlp_backward")
def _gradients(grad, x, weights, w1, w2, order, starts, hidden, by_experts: bool):
    def like(t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    by_weights = x.new_empty(0) if weights is None else like(weights)
    by_w = (like(w1), like(w2)) if by_experts else (x.new_empty(0), x.new_empty(0))
    return like(x), by_weights, *by_w


def _save(ctx, inputs, output) -> None:
    x, weights, w1, w2, order, starts, _ = inputs
    ctx.sinks = sinks_of(w1, w2)
    ctx.save_for_backward(x, weights, w1, w2, order, starts, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: None):
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    x, weights, w1, w2, order, starts, hidden = saved
    by_experts = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    rooms = rooms_of(ctx.sinks) if by_experts else None
    if rooms is not None:
        by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, by = None, None
        if weights is not None:
            rows, by = x.new_empty(len(order), x.shape[1]), torch.empty_like(weights).contiguous()
        _call_backward(grad, *saved, rows, by_x, by, *rooms.into, adds=rooms.adds)
        return by_x, by, put(w1), put(w2), None, None, None
    by_x, by_weights, by_w1, by_w2 = torch.ops.ptm.moe_mlp_backward(
        grad, x, weights, w1, w2, order, starts, hidden, by_experts
    )
    by_w = (by_w1, by_w2) if by_experts else (None, None)
    return by_x, None if weights is None else by_weights, *by_w, None, None, None


torch.library.register_autograd("ptm::moe_mlp", _differentiate, setup_context=_save)

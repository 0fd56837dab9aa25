"""SwiGLU experts over grouped rows: for each expert e, y = (silu(x G_e^T) * (x U_e^T)) W2_e^T, with
w1 = [G ; U].

Rows come in the layout of ptm/kernels/permute.py: group after group, aligned, zero rows between. On
a CPU the groups are walked in a loop, forward and backward in one function, so that the hidden rows
of one expert are still in cache when its activation and its second product want them. Only the
first product's result is kept; the activation is made again in the backward. On CUDA, in
bf16, the three steps are torch's grouped GEMM and its autograd.

Measured 2026-11, one core of an AMD EPYC (Zen 4), bf16, D=256 F=512 E=32, 4096 rows, forward and
backward: 72 ms against 86 for torch's grouped GEMM and autograd. Products run at 140-150 GFLOP/s in
both, where one large product reaches 200; what the loop saves is around the activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptm.kernels.permute import aligned


def experts_reference(x_RD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """One expert after another by plain autograd; for tests."""
    rows = []
    sizes = aligned(counts_E).tolist()
    for x, w1, w2 in zip(x_RD.split([*sizes, x_RD.shape[0] - sum(sizes)]), w1_EGD, w2_EDF):
        gate, up = F.linear(x, w1).chunk(2, dim=-1)
        rows.append(F.linear(F.silu(gate) * up, w2))
    return F.pad(torch.cat(rows), (0, 0, 0, x_RD.shape[0] - sum(sizes)))


def swiglu_experts(x_RD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Send each group of rows through its expert.

    Shapes: x (R, D), w1 (E, 2F, D) gate rows first, w2 (E, D, F), counts (E,) int64 without zero
    rows -> (R, D). An expert without rows gets a gradient of zeros.
    """
    ends = aligned(counts_E).cumsum(0)
    if not _has_grouped_gemm(x_RD):
        return _Experts.apply(x_RD, w1_EGD, w2_EDF, ends.tolist())  # type: ignore[return-value]
    offsets = ends.to(torch.int32)
    gate, up = F.grouped_mm(x_RD, w1_EGD.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w2_EDF.transpose(1, 2), offs=offsets)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, ends: list[int]) -> Tensor:
        y, hidden = forward_groups(x, w1, w2, ends)
        ctx.save_for_backward(x, w1, w2, hidden)
        ctx.ends = ends
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, w1, w2, hidden = ctx.saved_tensors
        grads = torch.empty_like(w1), torch.empty_like(w2)
        grad_x = backward_groups(grad, x, w1, w2, hidden, ctx.ends, into=grads)
        return grad_x, *grads, None


def forward_groups(
    x_RD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """`swiglu_experts` without autograd, for a caller that is a step of autograd itself.

    ends: where each group ends. Returns y (R, D) and the hidden rows (R, 2F) for the backward.
    """
    if _has_grouped_gemm(x_RD):
        return _grouped_forward(x_RD, w1_EGD, w2_EDF, ends)
    hidden = x_RD.new_empty(x_RD.shape[0], w1_EGD.shape[1])
    y = torch.empty_like(x_RD)
    for e, rows in _groups(ends):
        torch.mm(x_RD[rows], w1_EGD[e].t(), out=hidden[rows])
        gate, up = hidden[rows].chunk(2, dim=-1)
        torch.mm(F.silu(gate).mul_(up), w2_EDF[e].t(), out=y[rows])
    y[ends[-1] :] = 0
    return y, hidden


def backward_groups(
    grad_RD: Tensor,
    x_RD: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    hidden_RG: Tensor,
    ends: list[int],
    *,
    into: tuple[Tensor, Tensor],
) -> Tensor:
    """Gradient of x, (R, D); those of w1 and w2 are written over `into`, zeros for idle experts."""
    grad_w1, grad_w2 = into
    used = {e for e, _ in _groups(ends)}
    if _has_grouped_gemm(x_RD):
        grad_x = _grouped_backward(grad_RD, x_RD, w1_EGD, w2_EDF, hidden_RG, ends, into)
    else:
        grad_x = torch.empty_like(x_RD)
        for e, rows in _groups(ends):
            gate, up = hidden_RG[rows].chunk(2, dim=-1)
            activated = F.silu(gate)
            by_hidden = torch.empty_like(hidden_RG[rows])
            by_gate, by_up = by_hidden.chunk(2, dim=-1)
            by_product = grad_RD[rows] @ w2_EDF[e]
            torch.mul(by_product, activated, out=by_up)
            torch.ops.aten.silu_backward(by_product.mul_(up), gate, grad_input=by_gate)
            torch.mm(grad_RD[rows].t(), activated.mul_(up), out=grad_w2[e])
            torch.mm(by_hidden.t(), x_RD[rows], out=grad_w1[e])
            torch.mm(by_hidden, w1_EGD[e], out=grad_x[rows])
        grad_x[ends[-1] :] = 0
    for e in set(range(len(ends))) - used:
        grad_w1[e].zero_()
        grad_w2[e].zero_()
    return grad_x


def _has_grouped_gemm(x: Tensor) -> bool:
    return x.device.type != "cpu" and x.dtype == torch.bfloat16


def _grouped_forward(x: Tensor, w1: Tensor, w2: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    if not ends[-1]:
        return torch.zeros_like(x), x.new_zeros(x.shape[0], w1.shape[1])
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    hidden = F.grouped_mm(x, w1.transpose(1, 2), offs=offsets)
    gate, up = hidden.chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets), hidden


def _grouped_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    ends: list[int],
    into: tuple[Tensor, Tensor],
) -> Tensor:
    if not ends[-1]:
        return torch.zeros_like(x)
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    gate, up = hidden.chunk(2, dim=-1)
    activated = F.silu(gate)
    by_product = F.grouped_mm(grad, w2, offs=offsets)
    by_gate = torch.ops.aten.silu_backward(by_product * up, gate)
    by_hidden = torch.cat([by_gate, by_product * activated], dim=-1)
    grad_w1, grad_w2 = into
    grad_w2.copy_(F.grouped_mm(grad.t(), activated * up, offs=offsets))
    grad_w1.copy_(F.grouped_mm(by_hidden.t(), x, offs=offsets))
    return F.grouped_mm(by_hidden, w1, offs=offsets)


def _groups(ends: list[int]):
    """Yield (expert, its rows) for experts that have any."""
    for e, (start, end) in enumerate(zip([0, *ends], ends)):
        if start < end:
            yield e, slice(start, end)

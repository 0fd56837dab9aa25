"""GPTQ for one linear: the weights and what its inputs were in, codes and scales out.

Codes are chosen to keep the outputs, not the weights: with H = X^T X / T over the inputs X (T, K)
of calibration text, the loss of weights V in place of W is

    loss(V) = trace((W - V) H (W - V)^T)

    1 damp          H' = H + damping x mean(diag H), raised tenfold until Cholesky succeeds
    2 scales        fixed before the sweep (static groups), searched with diag(H) as importance
    3 sweep         inputs in order of diag(H), largest first; with U the upper Cholesky factor of
                    H'^-1: code the column, then take its error out of the columns behind it,
                    w[:, j:] -= (w[:, i] - v[:, i]) / U[i, i] x U[i, j:], in blocks of 128 columns
    4 descent       a few passes over the columns: each code becomes the best one with all others
                    as they are, which is exact, as the loss is a parabola in one weight; and so it
                    is in one scale, so between passes each scale becomes the best for its codes
    5 target        optional (GPTAQ): X here comes from layers already quantized; what is kept is
                    the output W X_fp^T of the whole model, in part `alpha`

Inputs that were always zero keep the nearest code: they cost nothing on calibration text, and
elsewhere the weight is still the best guess. Everything is fp32 on one device; only the upper half
of H is summed, in strips of 256 inputs. H and its factors are made on one thread: torch's sums over
rows, products X^T X and Cholesky factors have other bits on another number of threads, and codes
shall not. Within a block kernels serve 2, 3 and 4 (csrc/gptq), to the bits of the torch here.

Source: GPTQ, arXiv 2210.17323; GPTAQ, arXiv 2504.02692. Tried and left out: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptm.kernels import gptq as kernels
from ptm.quant.grid import Grid, Quantized, divisor_of

BLOCK = 128
CHUNK = 2048
STRIP = 256
MOST_DAMPING = 1e4
"""Times the first; a matrix that is still no better than this has no use."""


@dataclass(frozen=True)
class GptqOptions:
    """damping: of the mean diagonal. candidates: scales tried per group, 0 for the plain ones.
    descents: passes of coordinate descent after the sweep. alpha: of the target, 0 for W itself."""

    damping: float = 0.005
    is_ordered: bool = True
    candidates: int = 24
    descents: int = 3
    alpha: float = 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Products and sums inside have the bits of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_products(a_TM: Tensor, b_TN: Tensor, sum_MN: Tensor) -> None:
    """sum += a^T b of rows of inputs, in fp32; where b is a, only what is not below the diagonal is
    of use. Rows in bf16 are multiplied as they are where the CPU has tiles (csrc/gptq): torch
    would round every product to bf16, which makes such a matrix indefinite."""
    is_upper = b_TN is a_TM
    if kernels.multiplies(a_TM, b_TN):
        kernels.products(a_TM, b_TN, sum_MN)
        return
    with one_thread():
        for a, b in zip(a_TM.split(CHUNK), b_TN.split(CHUNK)):
            a, b = a.float(), b.float()
            for i in range(0, a.shape[1], STRIP):
                wanted = slice(i if is_upper else 0, None)
                sum_MN[i : i + STRIP, wanted] += a[:, i : i + STRIP].t() @ b[:, wanted]


class Hessian:
    """Sum of x x^T over the rows of calibration text, and how many there were."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.sum_KK = torch.zeros(num_inputs, num_inputs, device=device)
        self.num_rows = 0

    def add(self, x_TK: Tensor) -> None:
        """Rows of inputs (..., K)."""
        x_TK = x_TK.reshape(-1, self.sum_KK.shape[0])
        add_products(x_TK, x_TK, self.sum_KK)
        self.num_rows += x_TK.shape[0]

    def mean(self) -> Tensor:
        """(K, K) fp32, symmetric. Modifies: what is below the diagonal of the sum."""
        for i in range(0, len(self.sum_KK), STRIP):
            strip = self.sum_KK[i : i + STRIP, i:]
            square = strip[:, : len(strip)].triu()
            strip[:, : len(strip)] = square + square.triu(1).t()
            self.sum_KK[i + len(strip) :, i : i + STRIP] = strip[:, len(strip) :].t()
        return self.sum_KK / max(self.num_rows, 1)


@dataclass
class Factor:
    """What every linear that reads the same input shares: made once from their Hessian."""

    mean_KK: Tensor
    damped_KK: Tensor
    order_K: Tensor
    upper_KK: Tensor
    "Upper Cholesky factor of the inverse, in that order."
    damping: float
    dead_K: Tensor

    def solved(self, b_NK: Tensor) -> Tensor:
        """x of x H' = b."""
        x_NK = torch.empty_like(b_NK)
        x_NK[:, self.order_K] = b_NK[:, self.order_K] @ self.upper_KK.t() @ self.upper_KK
        return x_NK


@dataclass
class Solved:
    """error: relative, of the outputs on calibration text, ||(W - V) X||^2 / ||W X||^2."""

    quantized: Quantized
    error: float
    power: float
    "Of the outputs: ||W X||^2 / T."
    damping: float
    num_dead: int
    notes: list[str] = field(default_factory=list)


@one_thread()
def factorize(hessian_KK: Tensor, options: GptqOptions = GptqOptions()) -> Factor:
    """Raises ValueError where the matrix is not finite, or no damping makes it definite."""
    if not bool(hessian_KK.isfinite().all()):
        raise ValueError("the inputs of a layer are not finite on the calibration text")
    diagonal = hessian_KK.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    order = torch.arange(len(diagonal), device=dead.device)
    if options.is_ordered:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damping = options.damping
    while damping <= options.damping * MOST_DAMPING:
        damped = hessian_KK.clone()
        damped.diagonal().add_(torch.where(dead, mean, 0.0)).add_(damping * mean)
        found, failed = torch.linalg.cholesky_ex(damped[order[:, None], order])
        if not bool(failed):
            found = torch.cholesky_inverse(found)  # one name: what is large does not stay
            found, failed = torch.linalg.cholesky_ex(found, upper=True)
            if not bool(failed) and bool(found.isfinite().all()):
                return Factor(hessian_KK, damped, order, found, damping, dead)
        damping *= 10
    raise ValueError(f"no damping up to {damping / 10:g} makes the inputs' products definite")


def solve(
    w_NK: Tensor,
    factor: Factor,
    grid: Grid,
    options: GptqOptions = GptqOptions(),
    *,
    cross_KK: Tensor | None = None,
) -> Solved:
    """Codes and scales of one linear.

    Shapes: w (N, K). cross_KK: mean of (x_fp - x) x^T, for options.alpha > 0.
    Raises: ValueError where a weight is not finite.
    """
    w = w_NK.float()
    target = w
    if options.alpha and cross_KK is not None:
        target = w + options.alpha * factor.solved(w @ cross_KK)
    importance = factor.damped_KK.diagonal()
    scale, zero = grid.scales(target, importance, options.candidates)
    columns = _Columns(grid, scale, zero, w.shape[1])
    near_KN = _sweep(target, factor, columns)
    _descend(target, near_KN, factor, columns, options.descents)
    codes = columns.codes(near_KN.t())
    dead = factor.dead_K
    if bool(dead.any()):
        codes[:, dead] = columns.codes(w)[:, dead]
    quantized = Quantized(grid, codes, columns.scale_NG, zero)
    whole = power(w, factor.mean_KK)
    return Solved(
        quantized,
        relative_error(w, quantized.dequantize(), factor.mean_KK, whole),
        whole,
        factor.damping,
        int(dead.sum()),
    )


@one_thread()
def power(x_NK: Tensor, hessian_KK: Tensor) -> float:
    """||x X||^2 / T of inputs with this second moment, trace(x H x^T): H is symmetric, so in strips
    of its lower half."""
    total, x_NK = 0.0, x_NK.float()
    for i in range(0, len(hessian_KK), STRIP):
        strip = hessian_KK[i:, i : i + STRIP].clone()
        strip[STRIP:] *= 2
        total += float(((x_NK[:, i:] @ strip) * x_NK[:, i : i + STRIP]).sum(dtype=torch.float64))
    return total


def relative_error(
    w_NK: Tensor, near_NK: Tensor, hessian_KK: Tensor, whole: float | None = None
) -> float:
    """||(W - V) X||^2 / ||W X||^2 of inputs with this second moment; 0 where there is no output.
    whole: `power` of W, where that is known."""
    whole = power(w_NK, hessian_KK) if whole is None else whole
    return power(near_NK - w_NK, hessian_KK) / whole if whole > 0 else 0.0


class _Columns:
    """The grid one column at a time, with scales that fit its codes ever better; scales and zeros
    of a group lie in a row, in fp32."""

    def __init__(self, grid: Grid, scale_NG: Tensor, zero_NG: Tensor | None, num_inputs: int):
        self.grid, self.size, self.num_inputs = grid, grid.group or num_inputs, num_inputs
        self.scale_NG, self.zero_NG = scale_NG.clone(), zero_NG
        self.scale_GN = scale_NG.t().float().contiguous()
        self.divisor_GN = divisor_of(self.scale_GN)
        self.zero_GN = None if zero_NG is None else zero_NG.t().float().contiguous()
        self.spec = grid.kernel_spec(num_inputs)

    def nearest(self, w_N: Tensor, k: int) -> Tensor:
        g = k // self.size
        zero = float(self.grid.middle) if self.zero_GN is None else self.zero_GN[g]
        return self.grid.nearest(w_N, self.scale_GN[g], self.divisor_GN[g], zero)

    def sweep(self, w_BN: Tensor, upper_BB: Tensor, order_B: Tensor, near_KN: Tensor) -> Tensor:
        """Codes of the inputs order (B,), one after another. Modifies: their rows of near, and w.
        Returns what each was off by over U[i, i], (B, N)."""
        if kernels.serves(w_BN):
            grid = self.scale_GN, self.zero_GN, self.spec
            return kernels.sweep(w_BN, upper_BB, order_B, near_KN, *grid)
        errors, roots = torch.empty_like(w_BN), upper_BB.diagonal().tolist()
        for i, k in enumerate(order_B.tolist()):
            near = near_KN[k] = self.nearest(w_BN[i], k)
            error = torch.sub(w_BN[i], near, out=errors[i]).div_(roots[i])
            w_BN[i + 1 :] -= torch.outer(upper_BB[i, i + 1 :], error)
        return errors

    def descend(
        self, slope_BN: Tensor, hessian_BB: Tensor, dead_B: Tensor, near_BN: Tensor, start: int
    ) -> bool:
        """The best codes of the inputs from `start` on, one after another. Modifies: near, and
        slope for what moved. Returns whether any did."""
        if kernels.serves(slope_BN):
            grid = self.scale_GN, self.zero_GN, self.spec
            return kernels.descend(slope_BN, hessian_BB, dead_B, near_BN, start, *grid)
        curves, num_moved = hessian_BB.diagonal().tolist(), 0
        for i, is_dead in enumerate(dead_B.tolist()):
            if is_dead:
                continue
            near = self.nearest(slope_BN[i].div(curves[i]).add_(near_BN[i]), start + i)
            change = near - near_BN[i]
            num_moved += int(change.count_nonzero())
            near_BN[i] = near
            slope_BN -= torch.outer(hessian_BB[:, i], change)
        return num_moved > 0

    def codes(self, near_NK: Tensor) -> Tensor:
        """Of weights that lie on the grid."""
        return self.grid.encode(near_NK, self.scale_NG, self.zero_NG)

    def groups(self, start: int, stop: int) -> range:
        """Those that lie within these columns."""
        num_groups = len(self.scale_GN)
        end = num_groups if stop == self.num_inputs else stop // self.size
        return range(-(-start // self.size), end)

    def rescale(
        self, group: int, near_KN: Tensor, slope_KN: Tensor, block: slice, factor: Factor
    ) -> bool:
        """The best scales of a group for its codes, rounded as they are stored; modifies near, and
        slope within the block. Returns whether any moved.

        In a scale s of near = s u the loss is a parabola too: its lowest point is at
        s + u slope / (u H u^T), and rounding takes the stored number that is nearest to it.
        """
        of = slice(group * self.size, min((group + 1) * self.size, self.num_inputs))
        scale = self.scale_GN[group].clone()
        unit = near_KN[of] / self.divisor_GN[group]
        live = unit * ~factor.dead_K[of, None]
        curve = (live * (factor.damped_KK[of, of] @ live)).sum(0)
        step = (live * slope_KN[of]).sum(0) / curve.where(curve > 0, 1.0)
        wanted = (scale + step).to(self.scale_NG.dtype)
        is_good = (curve > 0) & (wanted.float() * scale > 0) & wanted.isfinite()
        found = torch.where(is_good, wanted, self.scale_NG[:, group])
        self.scale_NG[:, group] = found
        self.scale_GN[group] = found
        self.divisor_GN[group] = divisor_of(self.scale_GN[group])
        change = unit * self.scale_GN[group] - near_KN[of]
        near_KN[of] += change
        slope_KN[block] -= factor.damped_KK[block, of] @ change
        return bool((self.scale_GN[group] != scale).any())


def _sweep(target_NK: Tensor, factor: Factor, columns: _Columns) -> Tensor:
    """Weights on the grid, (K, N): step 3 of this file's docstring. Inputs are rows, to lie one by
    one."""
    order, upper = factor.order_K, factor.upper_KK
    w_KN = target_NK.t()[order].contiguous()
    near_KN, K = torch.empty_like(w_KN), len(order)
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        block = slice(start, stop)
        errors = columns.sweep(w_KN[block], upper[block, block], order[block], near_KN)
        w_KN[stop:].addmm_(upper[block, stop:].t(), errors, alpha=-1)
    return near_KN


def _descend(
    target_NK: Tensor, near_KN: Tensor, factor: Factor, columns: _Columns, passes: int
) -> None:
    """Step 4, in place: so many passes, or fewer where nothing moves any more.

    With the others fixed the loss is a parabola in one weight, so the best code is the one nearest
    to its lowest point, v + gradient / H[k, k]. The scales of a block's groups follow its codes, in
    all passes but the last.
    """
    hessian, dead = factor.damped_KK, factor.dead_K
    slope_KN = hessian @ (target_NK.t() - near_KN)
    K = len(near_KN)
    for left in reversed(range(passes)):
        has_moved = False
        for start in range(0, K, BLOCK):
            stop = min(start + BLOCK, K)
            block = slice(start, stop)
            near_BN, slope_BN = near_KN[block], slope_KN[block]
            before = near_BN.clone()
            has_moved |= columns.descend(
                slope_BN, hessian[block, block], dead[block], near_BN, start
            )
            for group in columns.groups(start, stop) if left else ():
                has_moved |= columns.rescale(group, near_KN, slope_KN, block, factor)
            changes = near_BN - before
            for rest in (slice(start if left else 0), slice(stop, K)):  # nobody asks those again
                slope_KN[rest].addmm_(hessian[rest, block], changes, alpha=-1)
        if not has_moved:
            break

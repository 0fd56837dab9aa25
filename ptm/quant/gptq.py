"""GPTQ for one linear: the weights and what its inputs were in, codes and scales out.

Codes are chosen to keep the outputs, not the weights: with H = X^T X / T over the inputs X (T, K)
of calibration text, the loss of weights V in place of W is

    loss(V) = trace((W - V) H (W - V)^T)

    1 damp          H' = H + damping x mean(diag H), raised tenfold until Cholesky succeeds
    2 scales        fixed before the sweep (static groups), searched with diag(H) as importance
    3 sweep         inputs in order of diag(H), largest first, in blocks of 128; with H' = R R^T, R
                    upper, the loss is |(W - V) R|^2: a block b aims at
                    W_b + (W - V)_before R[before, b] R_bb^-1, the errors of those before it made
                    good; within it, with U = R_bb^-1: code the column, then take its error out of
                    the columns behind it, w[:, j:] -= (w[:, i] - v[:, i]) / U[i, i] x U[i, j:].
                    U is a block of the upper Cholesky factor of H'^-1, so this is GPTQ without the
                    inverse (QuIP, arXiv 2307.13304, shows the two to be one)
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
    root_KK: Tensor
    "R, upper, of H' = R R^T in that order."
    damping: float
    dead_K: Tensor

    def added(self, x_NK: Tensor) -> float:
        """trace(x (H' - H) x^T), which is diagonal."""
        added_K = self.damped_KK.diagonal() - self.mean_KK.diagonal()
        return float((x_NK.square().sum(0) * added_K).sum(dtype=torch.float64))

    def solved(self, b_NK: Tensor) -> Tensor:
        """x of x H' = b."""
        x_NK, root = torch.empty_like(b_NK), self.root_KK
        half = torch.linalg.solve_triangular(
            root.t(), b_NK[:, self.order_K], upper=False, left=False
        )
        x_NK[:, self.order_K] = torch.linalg.solve_triangular(root, half, upper=True, left=False)
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
        last = order.flip(0)  # backwards: lower there is upper here
        found, failed = torch.linalg.cholesky_ex(damped.index_select(0, last).index_select(1, last))
        if not bool(failed) and bool(found.isfinite().all()):
            return Factor(hessian_KK, damped, order, found.flip(0, 1), damping, dead)
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
    near_KN, left_KN = _sweep(target, factor, columns)
    lost = float(left_KN.square().sum(dtype=torch.float64))
    lost -= _descend(near_KN, left_KN, factor, columns, options.descents)
    codes = columns.codes(near_KN.t())
    dead = factor.dead_K
    if bool(dead.any()):
        codes[:, dead] = columns.codes(w)[:, dead]
    quantized = Quantized(grid, codes, columns.scale_NG, zero)
    whole = power(w, factor.mean_KK)
    if target is w:
        lost -= factor.added(near_KN.t() - w)
    else:
        lost = power(quantized.dequantize() - w, factor.mean_KK)
    error = max(lost, 0.0) / whole if whole > 0 else 0.0
    return Solved(quantized, error, whole, factor.damping, int(dead.sum()))


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
        self, group: int, near_BN: Tensor, slope_BN: Tensor, start: int, factor: Factor
    ) -> bool:
        """The best scales of a group for its codes, rounded as they are stored. Modifies: near and
        slope, of the inputs from `start` on, which hold the group. Returns whether any moved.

        In a scale s of near = s u the loss is a parabola too: its lowest point is at
        s + u slope / (u H u^T), and rounding takes the stored number that is nearest to it.
        """
        of = slice(group * self.size, min((group + 1) * self.size, self.num_inputs))
        here = slice(of.start - start, of.stop - start)
        scale = self.scale_GN[group].clone()
        unit, dead = near_BN[here] / self.divisor_GN[group], factor.dead_K[of, None]
        live = unit * ~dead if bool(dead.any()) else unit
        product = factor.damped_KK[start : start + len(slope_BN), of] @ live
        curve = (live * product[here]).sum(0)
        step = (live * slope_BN[here]).sum(0) / curve.where(curve > 0, 1.0)
        wanted = (scale + step).to(self.scale_NG.dtype)
        is_good = (curve > 0) & (wanted.float() * scale > 0) & wanted.isfinite()
        found = torch.where(is_good, wanted, self.scale_NG[:, group])
        self.scale_NG[:, group] = found
        self.scale_GN[group] = found
        self.divisor_GN[group] = divisor_of(self.scale_GN[group])
        torch.mul(unit, self.scale_GN[group], out=near_BN[here])
        slope_BN.addcmul_(product, self.scale_GN[group] - scale, value=-1)
        return bool((self.scale_GN[group] != scale).any())


def _sweep(target_NK: Tensor, factor: Factor, columns: _Columns) -> tuple[Tensor, Tensor]:
    """Step 3 of this file's docstring: weights V on the grid, and what they leave, R^T (W - V),
    both (K, N): inputs are rows, to lie one by one; those of the second are in their order."""
    order, root = factor.order_K, factor.root_KK
    gap_KN = target_NK.t().contiguous().index_select(0, order)  # W - V where V is found, W behind
    near_KN, left_KN = torch.empty_like(gap_KN), torch.empty_like(gap_KN)
    one = torch.eye(BLOCK, device=root.device)
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        size = block.stop - start
        upper = torch.linalg.solve_triangular(root[block, block], one[:size, :size], upper=True)
        carried = root[:start, block].t() @ gap_KN[:start]
        aim_BN = torch.addmm(gap_KN[block], upper.t(), carried)
        left_KN[block] = columns.sweep(aim_BN, upper, order[block], near_KN)
        gap_KN[block] -= near_KN.index_select(0, order[block])
    return near_KN, left_KN


def _descend(
    near_KN: Tensor, left_KN: Tensor, factor: Factor, columns: _Columns, passes: int
) -> float:
    """Step 4, on near in place: so many passes, or fewer where nothing moves any more. Returns by
    how much the loss fell.

    With the others fixed the loss is a parabola in one weight, so the best code is the one nearest
    to its lowest point, v + slope / H'[k, k], with slope = H' (W - V) = R R^T (W - V). The scales
    of a block's groups follow its codes, in all passes but the last.
    """
    hessian, dead, order, root = factor.damped_KK, factor.dead_K, factor.order_K, factor.root_KK
    slope_KN, K, fell = torch.empty_like(near_KN), len(near_KN), 0.0
    for start in range(0, K if passes else 0, STRIP):
        strip = slice(start, start + STRIP)
        slope_KN[order[strip]] = root[strip, start:] @ left_KN[start:]
    for to_come in reversed(range(passes)):
        has_moved = False
        for start in range(0, K, BLOCK):
            stop = min(start + BLOCK, K)
            block = slice(start, stop)
            near_BN, slope_BN = near_KN[block], slope_KN[block]
            before, slopes = near_BN.clone(), slope_BN.clone()
            has_moved |= columns.descend(
                slope_BN, hessian[block, block], dead[block], near_BN, start
            )
            for group in columns.groups(start, stop) if to_come else ():
                has_moved |= columns.rescale(group, near_BN, slope_BN, start, factor)
            changes = near_BN - before
            fell += float(torch.dot(slopes.add_(slope_BN).flatten(), changes.flatten()))
            for rest in (slice(start if to_come else 0), slice(stop, K)):  # the first: never asked
                slope_KN[rest].addmm_(hessian[rest, block], changes, alpha=-1)
        if not has_moved:
            break
    return fell

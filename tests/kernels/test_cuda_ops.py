"""The CUDA kernels on a GPU, each against its definition in fp64; `make test-gpu` runs them. Their
first run on a device is still to come (docs/kernels.md)."""

import dataclasses

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import (  # noqa: F401
    adamw,
    moe_mlp,
    native,
    pieces,
    quant_linear,
    rmsnorm,
    rope,
    router,
)
from ptm.quant.fake_quant import fake_quant, on_grid
from ptm.quant.grid import Grid, GridKind
from tests.support.experts import BOUND, counted, dense, inputs
from tests.support.native import error

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native.CUDA_LIBRARY.exists(), reason="no libptm_cuda.so: no nvcc"),
]
FP32, BF16 = torch.float32, torch.bfloat16
each_type = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


@pytest.fixture(autouse=True)
def kernels_on():
    with native.forced_cuda(True):
        yield


def draw(*shape, dtype=FP32, seed=0, scale=1.0):
    """Drawn on the CPU, so the same on every machine."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return numbers.to(DEVICE, dtype).requires_grad_()


def wide(*tensors):
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def check(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == DEVICE and error(a.cpu(), b) <= bound


def twice(run):
    """The results, which are the same bits from a second call, on another stream."""
    first = run()
    torch.accelerator.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run()
    torch.accelerator.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first


@each_type
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 257), (3000, 33), (515, 2048)], ids=str)
def test_add_rmsnorm(shape, dtype):
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    weight, grads = draw(shape[-1], dtype=dtype, seed=2), [draw(*shape, dtype=dtype, seed=3)] * 2
    exact = wide(x, residual, weight)
    s = exact[0] + exact[1]
    s = s + (s.to(dtype).double() - s).detach()
    expected = [rmsnorm.rms_norm_reference(s, exact[2], 1e-6), s]
    expected += torch.autograd.grad(expected, exact, wide(*grads))

    def run():
        found = list(rmsnorm.add_rms_norm(x, residual, weight, 1e-6))
        return found + list(torch.autograd.grad(found, [x, residual, weight], grads))

    check(twice(run), expected, 4e-7 if dtype is FP32 else 5e-3)


@each_type
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 0, 1, 8), (2, 3, 1, 6), (2, 37, 3, 16), (2, 64, 16, 256)], ids=str
)
def test_rope_qk(shape, heads_inside, dtype):
    B, L, H, K = shape
    q, k = (draw(B, L, H * K, dtype=dtype, seed=i) for i in range(2))
    positions = torch.arange(L).expand(B, L)
    angles = rope.rope_angles(positions, rotary_dim=K // 4 * 2, base=1e4, mode="fp32")
    grads = [draw(B, L, H, K, dtype=dtype, seed=i + 2).transpose(1, 2) for i in range(2)]
    if not heads_inside:
        grads = [g.contiguous() for g in grads]
    exact = wide(q, k)
    x = torch.cat(exact, dim=-1).view(B, L, H, 2, K)
    expected = list(rope.rope_reference(x, *(a.double() for a in angles)))
    expected += torch.autograd.grad(expected, exact, wide(*grads))
    cos, sin = (a.to(DEVICE) for a in angles)

    def run():
        found = list(rope.rope_qk(q, k, cos, sin, num_heads=H))
        return found + list(torch.autograd.grad(found, [q, k], grads))

    check(twice(run), expected, 2e-7 if dtype is FP32 else 2.5e-3)


@each_type
@pytest.mark.parametrize(
    ("T", "E", "A"), [(0, 4, 2), (1, 1, 1), (9, 17, 17), (515, 32, 2), (5, 67, 3), (2, 512, 2)]
)
def test_attention_router(T, E, A, dtype):
    qkv = draw(T, 3 * E, dtype=dtype, scale=0.5)
    grads = [draw(T, A, seed=1), draw(T, E, seed=2)]
    [exact] = wide(qkv)
    expected = router.attention_router_reference(*exact.chunk(3, dim=1), A)

    def run():
        found = router.attention_router(qkv, A)
        results = [found.weights_TA, found.scores_TE]
        return [*results, *torch.autograd.grad(results, qkv, grads), found.ids_TA]

    *found, ids = twice(run)
    assert torch.equal(ids, router.top_experts(found[1], A))
    # The choice of the fp64 scores, but for ties closer than fp32 can tell.
    at = expected.scores_TE.gather(1, ids.cpu())
    assert (at - expected.scores_TE.gather(1, expected.ids_TA)).abs().le(1e-5).all()
    results = [at.softmax(-1), expected.scores_TE]
    results += torch.autograd.grad(results, exact, wide(*grads))
    check(found, results, 5e-6 if dtype is FP32 else 3e-3)


def test_a_tensor_of_another_device_is_refused():
    with pytest.raises(KernelError, match="argument 1 of shape .* on cpu is not contiguous in"):
        native.call("router_top", draw(2, 4), torch.ones(4), None, None, 2, 4, 2)


@pytest.mark.parametrize("grad_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("late", [None, 5e-3], ids=["on time", "a step late"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["fp32 moments", "int8 moments"])
@pytest.mark.parametrize("n", [0, 1, 129, 100_003])
def test_adamw_page_has_the_bits_of_the_cpus(n, is_int8, late, grad_dtype):
    if not native.has("adamw_page"):
        pytest.skip("no kernel for this CPU")
    blocks = -(-n // 128)
    kinds = (torch.int8, torch.uint8) if is_int8 else (FP32, FP32)
    grad = draw(n, dtype=grad_dtype, seed=3).detach()

    def swept(device):
        weight, rest = draw(n, dtype=BF16).detach(), draw(n, seed=1, scale=1e4).detach().short()
        m, v = (draw(n, seed=s, scale=50).detach().abs().to(k) for s, k in zip((4, 5), kinds))
        scales = [torch.full((blocks,), 1e-3) for _ in range(2)] if is_int8 else None
        all_of = [weight, rest, m, v, *(scales or [])]
        weight, rest, m, v, *scales = (t.to(device, copy=True) for t in all_of)
        stored = adamw.Stored(weight, rest, m, v, tuple(scales) if is_int8 else None)
        copy = weight.new_empty(n)
        square = torch.zeros(1, dtype=torch.float64, device=device)
        adamw.adamw_page(stored, grad.to(device), scale=0.3, step=3, lr=1e-2, betas=(0.9, 0.95),
                         eps=1e-8, weight_decay=0.1, middle=n // 3, last_lr=late, copy=copy,
                         square=square)  # fmt: skip
        return [t.cpu() for t in (weight, rest, m, v, *scales, copy)], square.cpu()

    (found, square), (wanted, exact) = swept(DEVICE), swept("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert error(square, exact) <= 1e-12


@pytest.mark.parametrize(("T", "A", "E"), [(0, 2, 4), (1, 1, 1), (33, 2, 5), (40_001, 2, 300)])
def test_moe_plan(T, A, E):
    draw = torch.Generator().manual_seed(T)
    ids = torch.randint(0, E, (T, A), generator=draw)
    order, starts = torch.ops.ptm.moe_plan(ids.to(DEVICE), E)
    assert torch.equal(order.cpu(), torch.argsort(ids.flatten(), stable=True))
    ends = torch.bincount(ids.flatten(), minlength=E).cumsum(0)
    assert starts[0] == 0 and torch.equal(starts[1:].cpu(), ends)


def by_one(tensor):
    """The same numbers in memory that begins two bytes further on: at no multiple of 16."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:]
    return moved.copy_(tensor.detach().flatten()).view(tensor.shape)


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(0, 32, 32, 4, 2, 4), (1, 32, 64, 4, 2, 4), (333, 160, 288, 5, 2, 5), (300, 96, 32, 3, 1, 1),
     (5, 32, 32, 300, 2, 300), (200, 32, 1056, 2, 2, 2)], ids=str,
)  # fmt: skip
def test_moe_mlp(shape, is_aligned):
    """T, D, F, E, A, experts in use: rows and panels that fill no tile, all to one, most idle."""
    case = inputs(*shape)
    exact = wide(*(case[i] for i in (0, 2, 3, 4)))
    y = dense(exact[0], case[1], *exact[1:])
    expected = [y, *torch.autograd.grad(y, exact, case[5].double())]
    x, ids, weights, w1, w2, grad = (t.detach().to(DEVICE) for t in case)
    if not is_aligned:
        x, w1, w2, grad = (by_one(t) for t in (x, w1, w2, grad))
    rows = [t.requires_grad_() for t in (x, weights, w1, w2)]

    def run():
        y = moe_mlp.moe_mlp(x, ids, weights, counted(ids, len(w1)), w1, w2)
        return [y, *torch.autograd.grad(y, rows, grad)]

    assert moe_mlp._serves(x, w1, w2)
    for bound, a, b in zip(BOUND.values(), twice(run), expected, strict=True):
        check([a], [b], bound)


@pytest.mark.parametrize("into", [FP32, BF16], ids=str)
def test_moe_mlp_puts_gradients_where_they_are_wanted(into):
    """Rooms at an odd number of elements, written over and added to; a row's own gradient where the
    row's was."""
    T, A = 90, 2
    x, ids, _, w1, w2, _ = (t.detach().to(DEVICE) for t in inputs(T, 64, 96, 4, A, 3))
    grad = draw(T * A, 64, dtype=BF16, seed=9).detach()
    exact, ones = wide(x.repeat_interleave(A, 0), w1, w2), torch.ones(T * A, 1, dtype=torch.float64)
    y = dense(exact[0], ids.cpu().reshape(-1, 1), ones, *exact[1:])
    expected = torch.autograd.grad(y, exact, grad.cpu().double())
    order, starts = torch.ops.ptm.moe_plan(ids, 4)
    to = torch.empty_like(grad)
    hidden = moe_mlp.forward_in_place(x, w1, w2, order, starts, to_ND=to, keep=True)
    check([to], [y], 6e-3)
    for adds in (False, True) if into is FP32 else (False,):
        rooms = [by_one(torch.full(w.shape, 0.5, dtype=into)) for w in (w1, w2)]
        rows = grad.clone()
        moe_mlp.backward_in_place(
            x, w1, w2, order, starts, hidden, rows_ND=rows, into=tuple(rooms), adds=adds
        )
        check([rows], expected[:1], 6e-3)
        check([room.float() - 0.5 * adds for room in rooms], expected[1:], 5e-3)


GRIDS = [Grid(kind, group) for kind in GridKind for group in (0, 32, 128)]
GRIDS += [Grid(kind, group, False) for kind in (GridKind.int4, GridKind.int8) for group in (0, 32)]


@each_type
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fake_quant_has_the_bits_of_the_reference(grid, dtype):
    for K in (1, 7, 96, 256, 300, 8192):
        w = draw(33, K, dtype=dtype, seed=K)
        wide = w.detach().cpu().float()
        grad = draw(33, K, dtype=dtype, seed=1).detach()

        def run(w=w, grad=grad):
            found = fake_quant(w, grid)
            return [found, *torch.autograd.grad(found, w, grad)]

        found, by_w = twice(run)
        expected = on_grid(wide, grid).dequantize().to(dtype)
        assert torch.equal(found.detach().cpu(), expected) and torch.equal(by_w, grad), K


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_a_group_without_a_scale_is_nan_and_nothing_waits(bad):
    w = draw(5, 64).detach()
    w[3, 40] = bad
    found = fake_quant(w, Grid(GridKind.int8, 32)).isnan()
    assert found[3, 32:].all() and found.sum() == 32


@each_type
@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("num_pieces", [1, 2, 5])
def test_add_pieces_has_the_bits_of_additions_in_order(num_pieces, replaces, dtype):
    for size, offset in ((1, 0), (7, 3), (40_001, 0), (1 << 20, 0), (40_001, 5)):
        received = draw(num_pieces, size + offset, dtype=dtype).detach()[:, offset:]
        total = draw(size, seed=1).detach()
        expected = received[0].cpu().float()
        for piece in received[1:].cpu():
            expected = expected + piece.float()
        expected = expected if replaces else total.cpu() + expected

        def run(received=received, total=total):
            found = total.clone()
            pieces.add_pieces(found, received, replaces=replaces)
            again = total.clone()
            norms = pieces.add_pieces_norms(again, received, replaces=replaces, chunk=1 << 16)
            return [found, again, norms]

        found, again, norms = twice(run)
        assert torch.equal(found.cpu(), expected) and torch.equal(again.cpu(), expected)
        exact = [part.double().norm() for part in expected.split(1 << 16)]
        check([norms], [torch.stack(exact)], 1e-13)


def packed_weights(N, K, *, bits, is_symmetric, group=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    G = -(-K // group)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = torch.rand(N, G, generator=generator) + 0.5
    zero = torch.randint(0, 15, (N, G), generator=generator, dtype=torch.uint8)
    sizes = torch.arange(32) / 4
    values = torch.cat([sizes, -sizes]) if bits == 6 else None
    return quant_linear.pack(codes, scale.half(), None if is_symmetric or bits == 6 else zero,
                             bits=bits, group=group, values=values)  # fmt: skip


def on_device(packed):
    tensors = ("codes", "scale", "zero", "values")
    moved = {k: t.to(DEVICE) for k in tensors if (t := getattr(packed, k)) is not None}
    return dataclasses.replace(packed, **moved)


@each_type
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    "shape", [(0, 16, 32), (1, 1, 1), (2, 37, 200), (1, 8192, 2048), (8, 50, 8192)], ids=str
)
def test_wq_linear(shape, bits, is_symmetric, dtype):
    T, N, K = shape
    packed = packed_weights(N, K, bits=bits, is_symmetric=is_symmetric)
    x = draw(T, K, dtype=dtype, seed=1).detach()
    expected = x.cpu().double() @ quant_linear.unpack(packed).double().t()
    weight = on_device(packed)
    found = twice(lambda: [quant_linear.wq_linear(x, weight)])
    one_rounding = 2.5e-3 if T * N > 1 else 2**-8  # the latter: the most of a single number
    check(found, [expected], (1e-6 if K < 1000 else 3e-6) if dtype is FP32 else one_rounding)


@each_type
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    ("T", "A", "E", "D", "F"),
    [(0, 2, 4, 32, 32), (1, 1, 1, 32, 16), (1, 2, 8, 40, 56), (6, 1, 4, 64, 48), (16, 2, 4, 96, 80),
     (5, 2, 300, 32, 32), (4, 2, 8, 2048, 1024)],
)  # fmt: skip
def test_wq_moe(T, A, E, D, F, bits, dtype):
    """The fourth has all rows at one expert, the others idle."""
    both = ((2 * F, D, bits == 4), (D, F, False))
    w1, w2 = (
        quant_linear.stack([
            packed_weights(N, K, bits=bits, is_symmetric=s, group=32, seed=e % 4) for e in range(E)
        ])
        for N, K, s in both
    )  # fmt: skip
    generator = torch.Generator().manual_seed(T)
    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :A].contiguous()
    ids = torch.full_like(ids, 2) if A == 1 and E > 1 else ids
    weights, x = torch.rand(T, A, generator=generator), draw(T, D, dtype=dtype, scale=0.05).detach()
    expected = torch.zeros(T, D, dtype=torch.float64)
    one, two = (quant_linear.unpack(w).double() for w in (w1, w2))
    for t, (row, chosen) in enumerate(zip(x.cpu().double(), ids.tolist())):
        for a, e in enumerate(chosen):
            gate, up = (one[e] @ row).chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).to(dtype).double()
            expected[t] += weights[t, a].double() * (two[e] @ inner)
    w1, w2 = on_device(w1), on_device(w2)
    ids, weights = ids.to(DEVICE), weights.to(DEVICE)
    assert quant_linear.serves_moe(x, ids, E)
    found = twice(lambda: [quant_linear.wq_moe(x, ids, weights, w1, w2)])
    check(found, [expected], 5e-6 if dtype is FP32 else 5e-3)

"""The CUDA kernels on a GPU, each against its definition in fp64; `make test-gpu` runs them. Their
first run on a device is still to come (docs/kernels.md)."""

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import native, rmsnorm, rope, router
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

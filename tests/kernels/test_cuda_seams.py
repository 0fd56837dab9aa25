"""Which tensors of a GPU reach the kernels, asked with fake ones, as there need be no GPU for it.
Gradients are asked for on a GPU only (test_cuda_ops.py): autograd wants the device."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ptm.kernels import native, pieces, quant_linear
from ptm.kernels.moe_mlp import CUDA_EXPERTS, moe_mlp, puts_gradients
from ptm.kernels.sink import put
from ptm.quant.fake_quant import fake_quant
from ptm.quant.grid import Grid, GridKind, round_to_nearest
from ptm.quant.modules import QuantExperts, QuantLinear, packed

pytestmark = pytest.mark.skipif(not native.CUDA_LIBRARY.exists(), reason="no libptm_cuda.so")
GRID = Grid(GridKind.int4, 32)


class Seen(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Routed:
    def __init__(self, T: int, A: int) -> None:
        self.ids_TA = on_gpu(T, A, dtype=torch.int64)
        self.weights_TA = on_gpu(T, A)


def on_gpu(*shape: int, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def fake():
    with native.forced_cuda(True), FakeTensorMode():
        yield


def moved(weight: quant_linear.PackedWeight) -> quant_linear.PackedWeight:
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "values")}
    fakes = {name: on_gpu(*t.shape, dtype=t.dtype) for name, t in tensors.items()}
    return dataclasses.replace(weight, **fakes)


def test_a_weight_on_the_grid(fake):
    w = on_gpu(6, 64, dtype=torch.bfloat16)
    with Seen() as seen:
        fake_quant(w, GRID)
    assert seen.ops == ["ptm.fake_quant.default"]


def test_quantized_products_of_a_few_rows():
    weights = [packed(round_to_nearest(torch.randn(64, 64), GRID)) for _ in range(3)]
    linear, experts = QuantLinear(weights[0]), QuantExperts(weights, weights[:])
    assert experts.stacked is not None
    with native.forced_cuda(True), FakeTensorMode():
        linear.packed = moved(linear.packed)
        experts.stacked = moved(experts.stacked[0]), moved(experts.stacked[1])
        with Seen() as seen:
            assert linear(on_gpu(8, 64)).shape == (8, 64)
        assert "ptm.wq_linear.default" in seen.ops
        with Seen() as seen:
            assert experts.run(on_gpu(12, 64), Routed(12, 2)).shape == (12, 64)
        assert "ptm.wq_moe.default" in seen.ops
        assert not any("item" in op or "local_scalar" in op for op in seen.ops)


def experts(E: int, *, dtype=torch.bfloat16, D: int = 64, F: int = 96, T: int = 12):
    x, w1, w2 = ((T, D), (E, 2 * F, D), (E, D, F))
    return tuple(on_gpu(*shape, dtype=dtype) for shape in (x, w1, w2))


def test_experts_in_training(fake):
    x, w1, w2 = experts(8)
    routed, counts = Routed(12, 2), on_gpu(8, dtype=torch.int64)
    with Seen() as seen:
        y = moe_mlp(x, routed.ids_TA, routed.weights_TA, counts, w1, w2)
    assert y.shape == x.shape and y.device.type == "cuda"
    assert [op for op in seen.ops if "ptm" in op] == ["ptm.moe_plan.default", "ptm.moe_mlp.default"]
    assert put(w1).device.type == "cuda"
    assert puts_gradients(*experts(CUDA_EXPERTS))
    others = {"E": CUDA_EXPERTS + 1}, {"D": 48}, {"F": 80}, {"dtype": torch.float32}
    assert not any(puts_gradients(*experts(**{"E": 8} | other)) for other in others)


def test_too_many_rows_or_experts_go_to_torch(fake):
    assert not quant_linear.serves_linear(on_gpu(9, 64))
    for T, E, kernels in ((8, 2, True), (9, 2, False), (1, 512, True), (1, 513, False)):
        served = quant_linear.serves_moe(on_gpu(T, 32), on_gpu(T, 2, dtype=torch.int64), E)
        assert served == kernels, (T, E)


def test_pieces_of_one_device(fake):
    total = on_gpu(100)
    strided = [torch.empty_strided((2, 100), (200, by), device="cuda") for by in (1, 2)]
    assert [pieces._serves(total, some) for some in strided] == [True, False]
    assert not pieces._serves(total, torch.empty(2, 100))


def test_nothing_without_the_switch():
    with native.forced_cuda(False), FakeTensorMode():
        assert not native.serves("fake_quant", on_gpu(2, 32))
        assert not quant_linear.serves_linear(on_gpu(2, 32))
        assert not quant_linear.serves_moe(on_gpu(2, 32), on_gpu(2, 2), 8)
        assert not pieces._serves(on_gpu(4), on_gpu(1, 4))
        assert not puts_gradients(*experts(8))

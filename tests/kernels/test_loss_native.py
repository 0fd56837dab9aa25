"""The compiled cross entropy of a linear head against its definition in fp64."""

import subprocess
import sys

import pytest
import torch

from ptm.common.errors import KernelError
from ptm.kernels import native
from ptm.kernels.loss import IGNORED, linear_cross_entropy, linear_cross_entropy_reference
from tests.support.native import error, poisoned, same_bits

pytestmark = pytest.mark.skipif("amx" not in native.machine(), reason="no library, or no AMX")

LOSS, GRADIENT = 1e-6, 3.5e-3  # fp32 logits; P and the gradient are each rounded to bf16, 2^-9
SHAPES = [(1, 8, 3), (2, 1, 1), (31, 40, 100), (65, 96, 1024), (40, 33, 2081)]


def inputs(T: int, D: int, V: int, spread: float = 0.3):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=draw).bfloat16().requires_grad_()
    weight = (spread * torch.randn(V, D, generator=draw)).bfloat16().requires_grad_()
    return x, weight, torch.randint(V, (T,), generator=draw)


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_ignoring", [False, True], ids=["all", "some ignored"])
def test_value_and_gradient(shape, is_ignoring):
    x, weight, labels = inputs(*shape)
    if is_ignoring:
        labels[1::3] = IGNORED
    exact = wide(x, weight)
    expected = linear_cross_entropy_reference(*exact, labels)
    wanted = torch.autograd.grad(expected * 0.01, exact)
    with poisoned():
        loss = linear_cross_entropy(x, weight, labels)
        grads = torch.autograd.grad(loss * 0.01, [x, weight])
    assert loss.dtype is torch.float32 and error(loss, expected) <= LOSS
    for found, want in zip(grads, wanted, strict=True):
        assert found.dtype is torch.bfloat16 and error(found, want) <= GRADIENT


def test_nothing_counts():
    x, weight, labels = inputs(5, 32, 40)
    for tokens in (0, 5):
        rows = x[:tokens]
        loss = linear_cross_entropy(rows, weight, torch.full_like(labels[:tokens], IGNORED))
        grads = torch.autograd.grad(loss, [x, weight])
        assert loss == 0 and all(bool((g == 0).all()) for g in grads)


def test_far_logits_and_the_torch_path_agree():
    x, weight, labels = inputs(64, 64, 300, spread=20.0)  # z to some 500: nearly one-hot
    exact = wide(x, weight)
    expected = linear_cross_entropy_reference(*exact, labels)
    loss = linear_cross_entropy(x, weight, labels)
    assert error(loss, expected) <= LOSS
    with native.forced(None):
        assert error(linear_cross_entropy(x, weight, labels), expected) <= 5e-3
    wanted = torch.autograd.grad(expected, exact)
    for found, want in zip(torch.autograd.grad(loss, [x, weight]), wanted, strict=True):
        assert error(found, want) <= GRADIENT


def test_a_nan_is_not_hidden():
    x, weight, labels = inputs(40, 32, 70)
    with torch.no_grad():
        x[3, 5] = float("nan")
    loss = linear_cross_entropy(x, weight, labels)
    grad_x, grad_weight = torch.autograd.grad(loss, [x, weight])
    assert loss.isnan() and grad_x[3].isnan().any() and grad_weight.isnan().any()


def test_a_label_outside_the_words_is_refused():
    x, weight, labels = inputs(4, 32, 10)
    labels[2] = 10
    with pytest.raises(KernelError, match="kernel=linear_ce: shapes"):
        linear_cross_entropy(x, weight, labels)


def test_the_same_bits_for_any_number_of_threads():
    x, weight, labels = inputs(200, 64, 1500)

    def run():
        loss = linear_cross_entropy(x, weight, labels)
        return [loss, *torch.autograd.grad(loss, [x, weight])]

    same_bits(run)


def test_the_op_keeps_torchs_rules():
    x, weight, labels = inputs(9, 32, 50)
    torch.library.opcheck(torch.ops.ptm.linear_ce.default, (x, weight, labels))
    whole = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = whole(x, weight, labels)
    assert torch.equal(loss, linear_cross_entropy(x, weight, labels))
    torch.autograd.grad(loss, [x, weight])


MEMORY = """
import torch
from ptm.kernels import native
from ptm.kernels.loss import linear_cross_entropy

def peak_mib():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024

T, D, V = 512, 64, 135040
assert native.has("linear_ce")
x = torch.ones(T, D, dtype=torch.bfloat16, requires_grad=True)
weight = torch.ones(V, D, dtype=torch.bfloat16, requires_grad=True)
labels = torch.zeros(T, dtype=torch.int64)
few = linear_cross_entropy(x[:32], weight[:64], labels[:32])
torch.autograd.grad(few, [x, weight])  # what torch loads on first use; and weight's gradient
before = peak_mib()
torch.autograd.grad(linear_cross_entropy(x, weight, labels), [x, weight])
print(peak_mib() - before)
"""


def test_no_tokens_by_words_tensor_exists():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # MiB, with the weight's gradient of 16; bf16 logits are 132

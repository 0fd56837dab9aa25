"""200 steps in bf16 with all kernels are those with references, within the noise of bf16."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import runs
from tests.support.native import needs_library

pytestmark = pytest.mark.slow
STEPS = 200


@needs_library
def test_kernels_train_as_references_do(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is what the references differ by from themselves, with micro-batches of 4 rows for
    2: the same sums, rounded elsewhere. And kernels twice are the same run, to the bit."""
    losses = {}
    for name, backend, rows in (
        ("reference", "reference", 2),
        ("rounded elsewhere", "reference", 4),
        ("kernels", "auto", 2),
        ("again", "auto", 2),
    ):
        monkeypatch.setenv("PTM_BACKEND", backend)
        changes = {"train.steps": STEPS, "train.precision": "bf16", "train.micro_batch_size": rows,
                   "checkpoint.interval": STEPS, "eval.interval": STEPS}  # fmt: skip
        done = runs.launch(0, runs.words(tmp_path / name, text, **changes), cache)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        losses[name] = torch.tensor([row["loss"] for row in runs.log(tmp_path / name)]).double()
    assert runs.log(tmp_path / "kernels") == runs.log(tmp_path / "again")
    assert runs.digests(tmp_path / "kernels", STEPS) == runs.digests(tmp_path / "again", STEPS)

    def gap(name: str, steps: slice = slice(None)) -> Tensor:
        return (losses[name] - losses["reference"])[steps]

    noise, found = gap("rounded elsewhere").square().mean(), gap("kernels").square().mean()
    late = gap("kernels", slice(-50, None)).mean().abs()
    print(f"rms: noise {noise.sqrt():.2e}, kernels {found.sqrt():.2e}; last 50 {late:.2e}")
    assert 0 < found < 2**2 * noise
    assert late < 0.01

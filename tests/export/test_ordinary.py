"""`ptm export` of ordinary folders: read back bit for bit, and opened by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.ordinary import KINDS, write_ordinary

from ptm.checkpoint import quant_config
from ptm.checkpoint.dequant import QuantSource
from ptm.checkpoint.hf import open_weights
from ptm.common.errors import CheckpointError
from ptm.export.config import ExportConfig, ExportFormat, Method
from ptm.export.layer import Record
from ptm.export.ordinary import OrdinaryWalk
from ptm.export.quantize import export

GPTQ, CT, FP6 = ExportFormat.gptq, ExportFormat.compressed_tensors, ExportFormat.fp6


def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(1))
    return ids, torch.zeros_like(ids)


def run(folder: Path, out: Path, **keys) -> tuple[Path, list[Record]]:
    config = ExportConfig(run=str(folder), out=str(out), **{"group": 32, "rows": 4, **keys})
    rows = None if config.method is Method.nearest else rows_of
    return export(config, OrdinaryWalk(folder, config.format), rows, lambda name: None)


def read(out: Path) -> QuantSource:
    keys = json.loads((out / "config.json").read_text())["quantization_config"]
    return QuantSource(open_weights(out), quant_config.parse(keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bits": "8", "symmetric": False, "method": Method.nearest},
        {"format": CT, "group": 0, "method": Method.nearest},
        {"format": FP6, "bits": "6", "method": Method.nearest},
    ],
    ids=["gptq", "int8-asymmetric", "compressed-tensors", "fp6"],
)
def test_an_export_has_every_linear_and_all_else_as_it_was(
    tmp_path: Path, kind: str, keys: dict
) -> None:
    folder = write_ordinary(tmp_path / "m", kind)
    out, records = run(folder, tmp_path / "out", **keys)
    walk = OrdinaryWalk(folder, keys.get("format", GPTQ))
    found = read(out)
    assert set(found.modules) == {r.name for r in records} == set(walk.linears(None))  # type: ignore
    assert set(found.names()) == set(walk.names())
    for name in walk.names():
        wanted, near = walk.read(name).float(), found.read(name)
        if name.removesuffix(".weight") not in found.modules:
            assert torch.equal(near, wanted), name
            continue
        error = float((near - wanted).square().sum() / wanted.square().sum())
        assert error < {"4": 0.1, "6": 5e-3, "8": 1e-3}[keys.get("bits", "4")], (name, error)
    if not keys:
        assert all(r.error and r.nearest and r.error < r.nearest for r in records)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"].get("checkpoint_format") in (None, "gptq", "gptq_v2")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_experts_in_one_tensor_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    a = write_ordinary(tmp_path / "a", kind)
    b = write_ordinary(tmp_path / "b", kind, is_fused=True)
    how = {"format": CT, "method": Method.nearest}
    outs = [run(f, tmp_path / f"{f.name}-out", **how)[0] for f in (a, b)]
    for path in sorted(outs[0].glob("*.safetensors")):
        assert path.read_bytes() == (outs[1] / path.name).read_bytes(), path.name


def test_folders_that_lack_or_have_too_much_are_refused(tmp_path: Path) -> None:
    folder = write_ordinary(tmp_path / "m", "mixtral")
    config = json.loads((folder / "config.json").read_text())
    for keys, match in (
        ({"num_local_experts": 5}, r"experts\.4\.gate_proj\.weight: is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is unknown"),
        ({"intermediate_size": 128}, r"has shape \(96, 64\) in .* needs \(128, 64\)"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        with pytest.raises(CheckpointError, match=match):
            OrdinaryWalk(folder, GPTQ)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_compressed_tensors(tmp_path: Path, kind: str) -> None:
    """Plain transformers on the CPU: the same weights bit for bit, logits of the dense model."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    folder = write_ordinary(tmp_path / "m", kind)
    out, _ = run(folder, tmp_path / "out", format=CT, method=Method.nearest)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(out, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense, source = load(folder, dtype=torch.bfloat16), read(out)
    own = dense.state_dict()
    num_compared = 0
    for name in source.modules:
        put(own, name, source.read(f"{name}.weight").to(torch.bfloat16))
    for name, tensor in theirs.state_dict().items():
        if name in own:
            assert torch.equal(tensor, own[name]), name
            num_compared += "experts" in name or "_proj" in name
    assert num_compared >= (2 if kind != "llama" else 0)
    ids = rows_of(2)[0]
    with torch.no_grad():
        found, wanted = theirs(ids).logits.float(), dense(ids).logits.float()
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def put(tensors: dict[str, torch.Tensor], module: str, weight: torch.Tensor) -> None:
    """Write a linear over a dense model's, whose experts are in one tensor."""
    if f"{module}.weight" in tensors:
        tensors[f"{module}.weight"].copy_(weight)
        return
    head, _, tail = module.replace("block_sparse_moe", "mlp").partition(".experts.")
    e, part = tail.split(".")
    if part in ("down_proj", "w2"):
        tensors[f"{head}.experts.down_proj"][int(e)].copy_(weight)
        return
    half = slice(0, len(weight)) if part in ("gate_proj", "w1") else slice(len(weight), None)
    tensors[f"{head}.experts.gate_up_proj"][int(e), half].copy_(weight)

"""Adapters written as PEFT's files: what the files say, and what PEFT makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptm.checkpoint.load_model import load_model
from ptm.common.errors import CheckpointError
from ptm.export.config import ConvertConfig, Stored, Target
from ptm.export.convert import convert
from ptm.model.hf_names import Layout
from ptm.model.lora_config import AdapterConfig, AdapterKind
from tests.support.adapters import AsPublished, tune

TARGETS = [("q",), ("k", "v"), ("q", "k", "v", "o", "experts")]
IDS = torch.arange(24).view(2, 12)


def lora(*targets: str) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.lora, targets=targets, rank=3, alpha=7.0)


def written(source: Path, out: Path, to: Target = Target.peft, **more) -> Path:
    convert(ConvertConfig(source=str(source), out=str(out), to=to, **more))
    return out


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_base_and_files_by_hand_are_the_merged_model(
    targets: tuple[str, ...], layout: Layout, tmp_path: Path
) -> None:
    base, tuned, _ = tune(tmp_path, lora(*targets))
    folder = written(tuned, tmp_path / "adapter", layout=layout)
    wanted = load_file(
        written(tuned, tmp_path / "m", Target.hf, layout=layout) / "model.safetensors"
    )
    found = load_file(written(base, tmp_path / "b", Target.hf, layout=layout) / "model.safetensors")
    before = dict(found)
    keys = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    stems = {name.rsplit(".lora_", 1)[0] for name in tensors}
    for stem in stems:
        module = stem.removeprefix("base_model.model.")
        assert re.fullmatch(keys["target_modules"], module)
        a, b = (tensors[f"{stem}.lora_{which}.weight"] for which in "AB")
        pattern = [key for key in keys["rank_pattern"] if re.fullmatch(key, module)]
        rank, alpha = keys["r"], keys["lora_alpha"]
        if pattern:
            rank, alpha = keys["rank_pattern"][pattern[0]], keys["alpha_pattern"][pattern[0]]
        assert len(a) == b.shape[1] == rank
        found[f"{module}.weight"] = found[f"{module}.weight"] + alpha / rank * b @ a
    assert sum(not torch.equal(before[name], wanted[name]) for name in wanted) == len(stems)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    modules = {name.removesuffix(".weight") for name in wanted}
    matched = {name for name in modules if re.fullmatch(keys["target_modules"], name)}
    assert matched == {stem.removeprefix("base_model.model.") for stem in stems}


@pytest.mark.slow  # importing peft takes ten seconds
@pytest.mark.parametrize("targets", [*TARGETS, ()], ids=lambda t: "+".join(t) or "prompt")
def test_peft_opens_them_with_the_same_logits(targets: tuple[str, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    transformers = pytest.importorskip("transformers")
    prompt = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=5)
    base, tuned, model = tune(tmp_path, lora(*targets) if targets else prompt)
    folder = written(tuned, tmp_path / "adapter")
    plain = AsPublished(load_model(base), transformers)
    before = plain(IDS).logits
    torch.testing.assert_close(before, load_model(base)(IDS), rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(plain, str(folder))
    found = theirs(input_ids=IDS).logits
    wanted = model(torch.cat([torch.tensor(2 * [model.soft_ids], dtype=torch.int64), IDS], dim=1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((found[:, len(model.soft_ids) :] - before).detach().abs().max()) > 1e-2


def test_what_has_no_such_form_is_one_line(tmp_path: Path) -> None:
    base, tuned, _ = tune(tmp_path, lora("q", "lfa"))
    for source, message in (
        (tuned, "adapter.targets=lfa: cannot be said in PEFT.*give to=hf"),
        (base, "source=.*holds no adapter; name a run of adapter.kind=lora or prompt"),
    ):
        with pytest.raises(CheckpointError, match=message):
            written(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_number_format_is_kept_or_converted(tmp_path: Path) -> None:
    _, tuned, _ = tune(tmp_path, lora("v"))
    kinds = []
    for name, dtype in (("as_is", None), ("bf16", Stored.bf16)):
        folder = written(tuned, tmp_path / name, dtype=dtype)
        kinds += {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()}
    assert kinds == [torch.float32, torch.bfloat16]

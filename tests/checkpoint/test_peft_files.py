"""Adapters written as PEFT's files: what the files say, and what PEFT makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptm.checkpoint.load_model import load_model
from ptm.checkpoint.open_model import base_of, open_model
from ptm.common.errors import CheckpointError
from ptm.export.config import ConvertConfig, Stored, Target
from ptm.export.convert import convert
from ptm.model.hf_names import Layout
from ptm.model.lora_config import AdapterConfig, AdapterKind
from tests.support.adapters import AsPublished, save, tune
from tests.support.tiny import tiny_model

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
def test_peft_opens_them_with_the_same_logits_and_what_it_saves_comes_back(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
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
    theirs.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").read_bytes() != (
        folder / "adapter_config.json"
    ).read_bytes()
    first, second = (open_model(one, may_have_soft=True) for one in (folder, tmp_path / "saved"))
    assert first.weights.names() == second.weights.names()
    for name in first.weights.names():
        assert torch.equal(first.weights.read(name), second.weights.read(name)), name


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


@torch.no_grad()
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_the_files_open_as_the_model_that_was_tuned(
    targets: tuple[str, ...], layout: Layout, tmp_path: Path
) -> None:
    base, tuned, model = tune(tmp_path, lora(*targets))
    folder = written(tuned, tmp_path / "adapter", layout=layout)
    opened = load_model(folder)
    torch.testing.assert_close(opened(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert float((opened(IDS) - load_model(base)(IDS)).abs().max()) > 1e-2
    weights = open_model(folder).weights
    for name in weights.names():
        whole = weights.read(name)
        if len(whole) > 2:
            assert torch.equal(weights.read(name, 1, len(whole) - 1), whole[1:-1]), name
    assert torch.equal(load_model(written(folder, tmp_path / "m", Target.ptm))(IDS), opened(IDS))
    pinned = base_of(folder)
    assert pinned == base_of(folder)
    save(base, tiny_model(seed=1), 1)
    assert pinned != base_of(folder)


@torch.no_grad()
def test_soft_tokens_come_back(tmp_path: Path) -> None:
    prompt = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=5)
    _, tuned, model = tune(tmp_path, prompt)
    file = written(tuned, tmp_path / "adapter") / "adapter_config.json"
    keys = json.loads(file.read_text())
    file.write_text(json.dumps(keys | {"num_virtual_tokens": 4}))
    with pytest.raises(CheckpointError, match="tensor=prompt_embeddings: has shape .* needs"):
        load_model(tmp_path / "adapter")
    file.write_text(json.dumps(keys))
    opened = load_model(tmp_path / "adapter")
    ids = torch.cat([torch.tensor(2 * [opened.soft_ids]), IDS], dim=1)
    assert len(opened.soft_ids) == 5 and torch.equal(opened(ids), model(ids))
    with pytest.raises(CheckpointError, match="5 soft tokens .* no weight can take them up"):
        written(tmp_path / "adapter", tmp_path / "out", Target.hf)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_model_name_or_path": "/none"}, "base_model_name_or_path=/none: is no folder here"),
        ({"base_model_name_or_path": "."}, "is an adapter itself"),
        ({"base_model_name_or_path": "other"}, "tensor=.*other.* has no such weight"),
        ({"base_model_name_or_path": "wide"}, "tensor=.*lora_A.weight: has shape"),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type=IA3: must be LORA or PROMPT_TUNING"),
        ({"use_rslora": True}, "adapter_config.json: use_rslora=True: is not read here"),
        ({"r": 4}, "tensor=.*lora_A.weight: has shape .* needs"),
        ({"lora_alpha": float("nan")}, "lora_alpha|adapter_config.json"),
        ({"lora_alpha": [1]}, "lora_alpha=.*: must be a positive number"),
        ({"alpha_pattern": 3}, "alpha_pattern=3: must be an object"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "alpha_pattern=.*is an expression, and none is run"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: is not read here"),
        ({"of_tomorrow": [1]}, "of_tomorrow=.*: is not read here"),
    ],
)
def test_files_that_do_not_fit_are_one_line(
    changes: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned, _ = tune(tmp_path, lora("q", "v"))
    folder = written(tuned, tmp_path / "adapter")
    monkeypatch.chdir(folder)
    for name, sizes in (("other", {"num_hidden_layers": 1}), ("wide", {"hidden_size": 64})):
        made = tmp_path / name
        save(made, tiny_model(**sizes), 1)
        if changes.get("base_model_name_or_path") == name:
            changes = {"base_model_name_or_path": str(made)}
    keys = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(folder)
    assert "\n" not in str(error.value)

"""A checkpoint of low-rank changes opens as the model that was tuned, and only beside its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ptm.checkpoint.load_model import load_model
from ptm.checkpoint.merged import adapter_to_json
from ptm.checkpoint.open_model import base_of, open_base, open_model
from ptm.common.errors import CheckpointError
from ptm.export.config import ExportConfig
from ptm.export.convert import ConvertConfig, Target, convert
from ptm.model.lora import add_lora
from ptm.model.lora_config import ROLES, AdapterConfig, AdapterKind
from ptm.verbs_export import export
from tests.support.adapters import Tuned, save, tune
from tests.support.tiny import tiny_model

LORA = AdapterConfig(kind=AdapterKind.lora, targets=ROLES, rank=3, alpha=6.0)
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def runs(tmp_path: Path) -> Tuned:
    return tune(tmp_path, LORA)


@torch.no_grad()
def test_it_opens_as_the_model_in_use_and_converts(runs, tmp_path: Path) -> None:
    base, tuned, model = runs
    wanted = model(IDS)
    assert not torch.equal(load_model(base)(IDS), wanted)
    assert torch.equal(load_model(tuned)(IDS), wanted)
    for target in (Target.ptm, Target.hf):
        convert(ConvertConfig(source=str(tuned), out=str(tmp_path / target), to=target))
        assert torch.equal(load_model(tmp_path / target, rope="fp32")(IDS), wanted)


@torch.no_grad()
def test_soft_tokens_open_beside_their_base_and_nothing_takes_them_up(tmp_path: Path) -> None:
    prompt = AdapterConfig(kind=AdapterKind.prompt, prompt_tokens=3)
    base, soft, model = tune(tmp_path, prompt)
    opened = load_model(soft)
    assert opened.soft_ids == [-1, -2, -3]
    ids = torch.cat([torch.tensor(2 * [opened.soft_ids]), IDS], dim=1)
    assert torch.equal(opened(ids), model(ids))
    assert torch.equal(opened(IDS), load_model(base)(IDS))
    for key, use in (
        ("folder", lambda: base_of(soft)),
        ("run", lambda: export(ExportConfig(run=str(soft)))),
        ("source", lambda: convert(ConvertConfig(source=str(soft), out=str(tmp_path / "out")))),
    ):
        with pytest.raises(CheckpointError, match=f"^{key}=.*3 soft tokens.*no weight can take"):
            use()
    assert not (tmp_path / "out").exists()


def test_rows_of_a_merged_tensor_are_those_of_the_whole(runs) -> None:
    weights = open_model(runs[1]).weights
    for name in weights.names():
        whole = weights.read(name)
        assert weights.info(name) == (tuple(whole.shape), whole.dtype)
        if len(whole) > 2:
            assert torch.equal(weights.read(name, 1, len(whole) - 1), whole[1:-1]), name


def test_a_base_that_goes_on_is_pinned(runs) -> None:
    base, tuned, model = runs
    save(base, tiny_model(seed=1), 2)
    assert open_model(base).folder.name == "step-00000002"
    assert torch.equal(load_model(tuned)(IDS), model(IDS))


def test_another_base_or_none_is_one_line(runs) -> None:
    base, tuned, _ = runs
    pinned = base_of(base)
    shutil.rmtree(base)
    save(base, tiny_model(seed=1), 1)
    for opens in (lambda: open_model(tuned), lambda: open_base(pinned)):
        with pytest.raises(CheckpointError, match="train.init_from=.*holds other weights than"):
            opens()
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="train.init_from=.*is not there.*put it back"):
        open_model(tuned)


def test_a_published_folder_is_known_by_its_files(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "m32_a"
    folder = Path(shutil.copytree(golden, tmp_path / "model"))
    pinned = base_of(folder)
    assert open_base(pinned).model.hidden_size > 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with pytest.raises(CheckpointError, match="holds other weights"):
        open_base(pinned)


@pytest.mark.parametrize("edit", [{"rank": 4}, {"kind": "none2"}, {"targets": ["q"]}, {"rank": {}}])
def test_an_adapter_that_does_not_fit_its_tensors_is_refused(runs, edit: dict) -> None:
    base, tuned, model = runs
    plain = tiny_model()
    add_lora(plain, LORA)
    plain.load_state_dict(model.state_dict())
    meta = {"adapter": adapter_to_json(LORA) | edit, "base": base_of(base)._asdict()}
    save(tuned, plain, 2, **meta)
    with pytest.raises(CheckpointError, match="adapter|lora_"):
        open_model(tuned / "checkpoints" / "step-00000002")

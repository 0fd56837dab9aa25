"""load_model gives the published numbers from a published folder and from a checkpoint of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.hf import write_hf
from ptm.checkpoint.load import load, load_weights
from ptm.checkpoint.load_model import load_model
from ptm.checkpoint.open_model import open_model
from ptm.checkpoint.save import Saver
from ptm.checkpoint.shards import new_folder
from ptm.checkpoint.verify import verify
from ptm.checkpoint.weights import model_to_json
from ptm.common.errors import CheckpointError, RecipeError
from ptm.engine.state import stored_shape
from ptm.export.convert import ConvertConfig, Target, convert
from ptm.model.config import ModelConfig, RopeMode, RouterKind
from ptm.model.hf_names import Layout
from ptm.model.transformer import Transformer
from tests.support.state import empty, paged

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
EXPECTED = {
    "hf_bf16": "expected",
    "megatron": "expected_rope_megatron",
    "fp32": "expected_rope_fp32",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, how in {"ptm": {}, "hf2": {"to": Target.hf, "layout": Layout.hf2}}.items():
        convert(ConvertConfig(source=str(GOLDEN), out=str(root / name), **how))
    return {"hf": GOLDEN, "hf2": root / "hf2", "ptm": root / "ptm"}


@torch.no_grad()
@pytest.mark.parametrize("rope", EXPECTED)
@pytest.mark.parametrize("kind", ["hf", "hf2", "ptm"])
def test_logits(folders: dict[str, Path], kind: str, rope: str) -> None:
    model = load_model(folders[kind], rope=rope)
    logits = model(load_file(GOLDEN / "inputs.safetensors")["input_ids"])
    expected = load_file(GOLDEN / f"{EXPECTED[rope]}.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert not model.training and logits.dtype == torch.float32


def test_published_weights_default_to_the_angles_they_were_trained_with(
    folders: dict[str, Path],
) -> None:
    for folder in folders.values():
        assert load_model(folder).config.rope_mode is RopeMode.megatron


@torch.no_grad()
def test_greedy_tokens(folders: dict[str, Path]) -> None:
    ids = load_file(GOLDEN / "inputs.safetensors")["input_ids"]
    expected = load_file(GOLDEN / "expected.safetensors")["greedy_tokens"]
    made = load_model(str(folders["ptm"]), "hf_bf16").generate(ids, expected.shape[1])
    assert torch.equal(made, torch.cat([ids, expected], dim=1))


def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "model.safetensors")
    halved = {name: t.bfloat16() for name, t in tensors.items()}
    save_file(halved, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    stored = halved["model.layers.0.mlp.experts.3.w2.weight"]
    assert torch.equal(model.state_dict()["model.layers.0.mlp.experts.w2"][3], stored)
    wide = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.state_dict()["model.layers.0.mlp.experts.w2"][3], stored.float())

    norms = {n: tensors[n] for n in tensors if "norm" in n}
    save_file(halved | norms, tmp_path / "model.safetensors")
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def tiny(router: RouterKind) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_projection_size=32,
        num_experts=4,
        moe_intermediate_size=8,
        router=router,
    )


def state_of(trained: Transformer, *, is_stacked: bool) -> dict[str, torch.Tensor]:
    """As engines give it: experts (E, R, C), or below each other (E x R, C)."""
    state = {"model." + name: tensor for name, tensor in trained.state_dict().items()}
    if not is_stacked:
        state = {name: tensor.reshape(stored_shape(tensor.shape)) for name, tensor in state.items()}
    return state | {"optim.exp_avg.x": torch.ones(3)}


@torch.no_grad()
@pytest.mark.parametrize("is_stacked", [True, False], ids=["3-D", "2-D"])
@pytest.mark.parametrize("router", list(RouterKind))
def test_a_run_loads_as_it_was_trained(
    tmp_path: Path, router: RouterKind, is_stacked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(router)
    trained = Transformer(config)
    trained.init_weights(seed=1)
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(background=False), run_id="r")
    for step in (1, 2):
        trained.model.norm.weight.fill_(float(step))
        state = state_of(trained, is_stacked=is_stacked)
        saver.save(state, step=step, meta={"model": model_to_json(config)}, block=True)
    saver.close()
    ids = torch.arange(20).reshape(2, 10)
    for folder in (tmp_path, tmp_path / "checkpoints" / "step-00000002"):
        loaded = load_model(folder)
        assert loaded.config == config and loaded.config.rope_mode is RopeMode.fp32
        assert torch.equal(loaded(ids), trained.eval()(ids))
    assert load_model(tmp_path, rope="megatron").config.rope_mode is RopeMode.megatron

    newest = next((tmp_path / "checkpoints" / "step-00000002").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert load_model(tmp_path).model.norm.weight[0] == 1.0
    assert newest.name in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002|safetensors"):
        load_model(tmp_path / "checkpoints" / "step-00000002")


@torch.no_grad()
@pytest.mark.parametrize("is_stacked", [True, False], ids=["3-D", "2-D"])
def test_a_run_is_converted_and_started_from(tmp_path: Path, is_stacked: bool) -> None:
    config = tiny(RouterKind.attention)
    trained = Transformer(config)
    trained.init_weights(seed=1)
    run = tmp_path / "run"
    saver = Saver(run / "checkpoints", CheckpointConfig(background=False), run_id="r")
    state = state_of(trained, is_stacked=is_stacked)
    saver.save(state, step=1, meta={"model": model_to_json(config)}, block=True)
    saver.close()
    folders = {"run": run, "ptm": tmp_path / "ptm", "hf": tmp_path / "hf"}
    convert(ConvertConfig(source=str(run), out=str(folders["ptm"])))
    ids = {f"{kind}_token_id": 0 for kind in ("bos", "eos", "pad")}
    with new_folder(folders["hf"]) as folder:
        how = {"layout": Layout.hf, "dtype": None, "shard_bytes": 10**9}
        write_hf(folder, open_model(run), ids=ids, **how)
    made = {f"model.{n}": tensor for n, tensor in trained.state_dict().items()}
    for folder in folders.values():
        opened = open_model(folder)
        for name, tensor in trained.state_dict().items():
            assert torch.equal(opened.weights.read(name), tensor), (folder, name)
        # Rows that begin and end in the middle of an expert.
        for rank in range(3):
            into = paged(empty(made), tmp_path / "into", rank=rank, world=3)
            load_weights(opened.weights, into)
            for name, rows in into.items():
                wanted = made[name].reshape(rows.shape)[rows.first_row :][: rows.num_rows]
                assert torch.equal(rows.read(), wanted), (folder, name)
    good = verify(folders["ptm"])
    assert len(good.manifest.census["model.model.layers.0.mlp.experts.w1"].shape) == 3
    into = paged(empty(made), tmp_path / "into", rank=0, world=1)
    load(good, into, weights_only=True)
    for name, rows in into.items():
        assert torch.equal(rows.read(), made[name].reshape(rows.shape)), name


def test_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config = ModelConfig(router=RouterKind.linear, hidden_size=16, num_attention_heads=2)
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(background=False), run_id="r")
    meta = {"model": model_to_json(config)}
    saver.save({"model.x": torch.ones(2)}, step=1, meta=meta, block=True)
    saver.close()
    with pytest.raises(CheckpointError, match="tensor=.*is missing"):
        load_model(tmp_path)


def test_refuses_an_unknown_rope() -> None:
    with pytest.raises(RecipeError, match="rope=yarn: must be one of hf_bf16, megatron, fp32"):
        load_model(GOLDEN, rope="yarn")

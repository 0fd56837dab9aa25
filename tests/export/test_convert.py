"""Converting there and back: every bit, every key, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from ptm.checkpoint import manifest
from ptm.checkpoint.config import CheckpointConfig
from ptm.checkpoint.hf_config import render
from ptm.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter, as_bytes
from ptm.checkpoint.save import Saver
from ptm.checkpoint.verify import verify
from ptm.checkpoint.weights import model_from_json, model_to_json
from ptm.common.errors import CheckpointError
from ptm.data.tokenizer import load_tokenizer, train_tokenizer
from ptm.export.convert import ConvertConfig, Stored, Target, convert
from ptm.model.config import ModelConfig, RouterKind
from ptm.model.hf_names import HEAD, Layout, our_shapes, published
from tests.support.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
EMBEDDING = "model.embed_tokens.weight"
TINY = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_projection_size=32,
    num_experts=5,
    moe_intermediate_size=8,
    rope_theta=40_890.0,
)


def run(source: Path, out: Path, **how: object) -> Path:
    convert(ConvertConfig(source=str(source), out=str(out), **how))  # type: ignore[arg-type]
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.shape, tensor.dtype) == (b[name].shape, b[name].dtype), name
        assert as_bytes(tensor) == as_bytes(b[name]), name


def drop_copy(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors")


def untie(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: tensors[HEAD] + 1}, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"tie_word_embeddings": False}))


def in_bf16(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("change", [None, drop_copy, untie, in_bf16])
@pytest.mark.parametrize("shard_bytes", [2**40, 2**20])
def test_hf_to_ptm_to_hf(
    tmp_path: Path, change: Callable[[Path], None] | None, shard_bytes: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, source)
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    if change:
        change(source)
    ours = run(source, tmp_path / "ours", shard_bytes=shard_bytes)
    back = run(ours, tmp_path / "back", to=Target.hf, shard_bytes=shard_bytes)
    assert_same(tensors_of(back), tensors_of(source))
    keys = json.loads((back / "config.json").read_text())
    assert keys == json.loads((source / "config.json").read_text())
    assert (back / "tokenizer.model").read_bytes() == bytes(range(256))


def test_the_checkpoint_between(tmp_path: Path) -> None:
    ours = run(GOLDEN, tmp_path / "ours")
    found = verify(ours).manifest
    assert (found.holds, found.step, found.world) == ("weights", 0, 1)
    golden = load_file(GOLDEN / "model.safetensors")
    shapes = our_shapes(model_from_json(found.meta["model"]))
    assert {n: e.shape for n, e in found.census.items()} == {
        f"model.{name}": shape for name, shape in shapes.items()
    }
    w2 = load_file(ours / "model.safetensors")["model.model.layers.1.mlp.experts.w2"]
    for e in range(8):
        assert torch.equal(w2[e], golden[f"model.layers.1.mlp.experts.{e}.w2.weight"])


@pytest.mark.parametrize("shard_bytes", [2**40, 2**20])
def test_hf2_stays_hf2_unless_asked(tmp_path: Path, shard_bytes: int) -> None:
    hf2 = run(GOLDEN, tmp_path / "hf2", to=Target.hf, layout=Layout.hf2, shard_bytes=shard_bytes)
    ours = run(hf2, tmp_path / "ours")
    assert_same(tensors_of(run(ours, tmp_path / "a", to=Target.hf)), tensors_of(hf2))
    hf = run(ours, tmp_path / "b", to=Target.hf, layout=Layout.hf)
    assert_same(tensors_of(hf), load_file(GOLDEN / "model.safetensors"))


def test_dtype(tmp_path: Path) -> None:
    ours = run(GOLDEN, tmp_path / "ours", dtype=Stored.bf16)
    back = run(ours, tmp_path / "back", to=Target.hf)
    golden = load_file(GOLDEN / "model.safetensors")
    assert_same(tensors_of(back), {name: t.bfloat16() for name, t in golden.items()})
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


def state_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        prefix + name: torch.rand(shape, generator=generator)
        for prefix in ("model.", "optim.exp_avg.", "optim.exp_avg_sq.")
        for name, shape in our_shapes(model).items()
    }


def save_run(rank: int, world: int, root: str, tokenizer: str, is_tied: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from ptm.mesh.peers import Peers

    model = tiny(is_tied)
    mesh = init_device_mesh("cpu", (world,))
    state = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in state_of(model).items()}
    saver = Saver(
        Path(root),
        CheckpointConfig(background=False),
        run_id="r",
        peers=Peers(torch.distributed.group.WORLD),
    )
    saver.save(
        state,
        step=7,
        meta={"model": model_to_json(model)},
        attachments={"tokenizer": Path(tokenizer)},
        block=True,
    )
    saver.close()


def tiny(is_tied: bool) -> ModelConfig:
    return ModelConfig(
        **{k: getattr(TINY, k) for k in TINY.__slots__} | {"tie_word_embeddings": is_tied}
    )


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_trained_run_becomes_a_published_folder(tmp_path: Path, is_tied: bool) -> None:
    tokenizer = train_tokenizer(iter(["def f(x): return x\n"] * 20), 270)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    root = tmp_path / "run" / "checkpoints"
    run_ranks(3, save_run, str(root), str(tmp_path / "tokenizer"), is_tied)

    made = run(tmp_path / "run", tmp_path / "hf", to=Target.hf)
    model, state = tiny(is_tied), state_of(tiny(is_tied))
    wanted = {}
    for name, rows in published(model, Layout.hf, tied_copy=True).items():
        parts = [state["model." + p.name][p.start : p.stop].reshape(-1) for p in rows.pieces]
        wanted[name] = torch.cat(parts).reshape(rows.shape)
    assert_same(tensors_of(made), wanted)

    keys = json.loads((made / "config.json").read_text())
    assert keys.keys() >= json.loads((GOLDEN / "config.json").read_text()).keys()
    assert keys["architectures"] == ["YuanForCausalLM"] and keys["torch_dtype"] == "float32"
    assert keys["rotary_base"] == 40_890.0 and keys["tie_word_embeddings"] is is_tied
    assert {keys[k] for k in ("pad_token_id", "bos_token_id", "eos_token_id", "eod_token")} == {
        tokenizer.eod_id
    }
    assert keys["sep_token"] == tokenizer.sep_id
    assert load_tokenizer(made).fingerprint == tokenizer.fingerprint
    assert json.loads((made / "tokenizer_config.json").read_text())["eos_token"] == "<eod>"

    # And back: the same weights, as they would be loaded to train on.
    ours = run(made, tmp_path / "ours")
    again = load_file(ours / "model.safetensors")
    assert_same(again, {n: t for n, t in state.items() if n.startswith("model.")})
    one = root / "step-00000007"
    assert_same(tensors_of(run(one, tmp_path / "one", to=Target.hf)), wanted)


def test_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    ours = run(GOLDEN, tmp_path / "ours")
    with open(ours / "model.safetensors", "r+b") as file:
        file.seek(-100_000, 2)
        byte = file.read(1)[0]
        file.seek(-100_000, 2)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CheckpointError, match=r"model\.model\.layers.*damaged"):
        run(ours, tmp_path / "back", to=Target.hf)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_refuses_a_router_that_was_never_published(tmp_path: Path) -> None:
    model = ModelConfig(router=RouterKind.linear, hidden_size=16, num_attention_heads=2)
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(background=False), run_id="r")
    state = {"model.x": torch.ones(2)}
    saver.save(state, step=1, meta={"model": model_to_json(model)}, block=True)
    saver.close()
    with pytest.raises(CheckpointError, match="model.router=linear: has no published form"):
        run(tmp_path, tmp_path / "out", to=Target.hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "tensor=|is unknown|is missing"),
        ({"model": None}, "model=None: must be an object"),
        ({"model": {"hidden_size": "64"}}, "hidden_size=64: must be of type int"),
        ({"model": {"hidden_size": True}}, "hidden_size=True: must be of type int"),
        ({"model": {"router": "magic"}}, "router=magic: must be one of attention"),
        ({"model": {"hidden_size": 63}}, "hidden_size"),
        ({"model": {"colour": "red"}}, "colour=red: is no key of a model"),
        ({"published": {}}, "published={}: must have layout, tied_copy, config"),
        ({"published": {"layout": "hf3", "tied_copy": True, "config": {}}}, "must be a layout"),
        ({"published": {"layout": "hf", "tied_copy": 1, "config": {}}}, "must be a layout"),
        ({"published": {"layout": "hf", "tied_copy": True, "config": {"a": 1}}}, "moe_config"),
    ],
)
def test_refuses_a_manifest_that_makes_no_sense(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    ours = run(GOLDEN, tmp_path / "ours")
    found = manifest.read(ours)
    found.meta.update(change)
    (ours / manifest.FILE).unlink()
    manifest.write(ours, found)
    with pytest.raises(CheckpointError, match=message) as caught:
        run(ours, tmp_path / "back", to=Target.hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_refuses_what_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        CheckpointError,
        match="has no manifest.json, checkpoints, config.json or adapter_config.json",
    ):
        run(tmp_path / name, tmp_path / "out")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        run(tmp_path, tmp_path / "out")


def make_big(folder: Path) -> dict[str, str]:
    """One layer of the full model with its vocabulary: 4.5 GB of random bytes in three files."""
    model = ModelConfig(num_hidden_layers=1)
    shapes = {n: r.shape for n, r in published(model, Layout.hf, tied_copy=True).items()}
    names = sorted(shapes)
    folder.mkdir()
    block = np.frombuffer(np.random.default_rng(1).bytes(2**26), np.uint8)
    digests, where = {}, {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        mine = {name: (shapes[name], torch.bfloat16) for name in names[part::3]}
        with SafetensorsWriter(folder / file, mine) as writer:
            for name in writer.names:
                # The tied copy must be equal, so these two share a seed.
                seed = 0 if name in (HEAD, EMBEDDING) else names.index(name)
                raw = np.resize(np.roll(block, seed), 2 * int(np.prod(shapes[name])))
                tensor = torch.from_numpy(raw).view(torch.bfloat16)
                writer.write(name, tensor)
                digests[name] = xxhash.xxh3_128_hexdigest(raw)
        where |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    keys = render(model, None, pad_token_id=0, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(keys))
    return digests


def peak_bytes(source: Path, out: Path, to: str) -> int:
    # VmHWM and not ru_maxrss: the latter starts from the size of the process that forked.
    code = f"""
        from ptm.export.convert import ConvertConfig, Target, convert
        convert(ConvertConfig(source={str(source)!r}, out={str(out)!r}, to=Target({to!r})))
        status = open("/proc/self/status").read().split()
        print(status[status.index("VmHWM:") + 1])
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 12 * 10**9:
        pytest.skip("needs 12 GB of disk")
    digests = make_big(tmp_path / "big")
    size = sum(path.stat().st_size for path in (tmp_path / "big").iterdir())
    assert size > 4 * 2**30
    there = peak_bytes(tmp_path / "big", tmp_path / "ours", "ptm")
    shutil.rmtree(tmp_path / "big")
    back = peak_bytes(tmp_path / "ours", tmp_path / "back", "hf")
    shutil.rmtree(tmp_path / "ours")
    print(f"{size} bytes: peak {there / 2**20:.0f} MiB to ptm, {back / 2**20:.0f} MiB to hf")
    assert max(there, back) < 2**30
    found = {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        file = SafetensorsFile(tmp_path / "back", path.name)
        found |= {n: xxhash.xxh3_128_hexdigest(as_bytes(file.read(n))) for n in file.tensors}
    assert found == digests

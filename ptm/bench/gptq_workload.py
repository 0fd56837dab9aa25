"""The model and text of `ptm bench gptq`: a small Llama that is as hard to quantize as a real one.

    workload-64/  config.json  model.safetensors  tokenizer.json   hidden size 1024, 4 layers, bf16
                  tokens.json  {"calibration": 64 rows of 512, "held_out": 16 rows}

Nothing is downloaded, so it is drawn at random, and with what makes inputs of real models unlike
noise (with Gaussian ones GPTQ is no better than rounding): heavy-tailed weights (Student's t with 5
degrees of freedom), rows of different sizes, embeddings near a plane of 64 dimensions, a few
channels that norms make ten times as large, and text in which each token has 32 likely successors.

The draws follow the order of the workload of November 2026 on which peers were measured, so the
folder holds the same weights and tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from torch import Tensor

from ptm.checkpoint.safetensors_file import SafetensorsWriter
from ptm.export.ordinary_config import parse

HELD_OUT_ROWS = 16
_LINKS = 32
"Likely successors of a token."
_LEAP = 0.3
"How often another token follows."


class Size(NamedTuple):
    """Of the model and of the calibration text."""

    hidden: int = 1024
    inner: int = 2816
    layers: int = 4
    vocabulary: int = 8192
    rows: int = 64
    length: int = 512


COMMON = Size()


def write_workload(folder: Path, size: Size = COMMON, seed: int = 0) -> None:
    """The folder must not exist. Its last file is tokens.json."""
    g = torch.Generator().manual_seed(seed)
    keys = _config(size)
    shapes = parse(keys).shapes()
    tensors = {name: _weight(name, shapes[name], g) for name in _order(shapes)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    header = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", header, {"format": "pt"}) as file:
        for name in file.names:
            file.write(name, tensors[name])
    _write_tokenizer(folder, size.vocabulary)
    rows = _tokens(size, g)
    text = {"calibration": rows[: size.rows].tolist(), "held_out": rows[size.rows :].tolist()}
    (folder / "tokens.json").write_text(json.dumps(text))


def read_tokens(folder: Path) -> tuple[Tensor, Tensor]:
    """(rows, length) of calibration, and what was held out."""
    text = json.loads((folder / "tokens.json").read_text())
    return torch.tensor(text["calibration"]), torch.tensor(text["held_out"])


def _config(size: Size) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(2, size.hidden // 64),
        "num_key_value_heads": max(1, size.hidden // 128),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _order(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Embedding, then by layer the linears before the norms, last norm, head."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up")]
    parts += ["mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    num_layers = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("model.layers."))
    inner = [f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in parts]
    names = ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]
    assert set(names) == set(shapes), set(names) ^ set(shapes)
    return names


def _weight(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    def normal(*sides: int) -> Tensor:
        return torch.randn(sides, generator=g)

    if len(shape) == 1:
        w = torch.exp(0.5 * normal(*shape))
        w[torch.randperm(shape[0], generator=g)[: max(1, shape[0] // 200)]] *= 10.0
        return (w * 0.5).to(torch.bfloat16)
    if "embed_tokens" in name:
        rank = 64
        rows, columns = normal(shape[0], rank), normal(rank, shape[1])
        falling = torch.arange(1, rank + 1).float() ** -0.7
        plane = (rows * falling) @ columns / falling.square().sum().sqrt()
        return (plane + 0.3 * normal(*shape)).to(torch.bfloat16)
    row_size = torch.exp(0.3 * normal(shape[0], 1))
    heavy, squares = normal(*shape), torch.zeros(shape)
    for _ in range(5):
        squares += normal(*shape).square()
    heavy /= (squares / 5).sqrt()
    return (heavy / shape[1] ** 0.5 * row_size * 0.6).to(torch.bfloat16)


def _tokens(size: Size, g: torch.Generator) -> Tensor:
    """Rows of ids from 2 on: often one of a token's successors, else by Zipf's law."""
    count, V = size.rows + HELD_OUT_ROWS, size.vocabulary
    frequency = 1.0 / torch.arange(3, V + 1).float()

    def by_frequency(n: int) -> Tensor:
        return torch.multinomial(frequency, n, replacement=True, generator=g)

    successors = by_frequency(V * _LINKS).view(V, _LINKS)
    found = torch.empty(count, size.length, dtype=torch.long)
    now = by_frequency(count)
    for i in range(size.length):
        found[:, i] = now + 2
        leaps = torch.rand(count, generator=g) < _LEAP
        linked = successors[now, torch.randint(0, _LINKS, (count,), generator=g)]
        now = torch.where(leaps, by_frequency(count), linked)
    return found


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Peers want one; nothing here uses it."""
    words = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>"))}
    words |= {f"t{i}": i for i in range(3, vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))

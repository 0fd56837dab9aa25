"""Whole runs through the command line, small enough for tests."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def corpus(folder: Path) -> Path:
    """A folder of real text: 40 modules of the standard library as .txt documents."""
    target = folder / "corpus"
    target.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    modules = [p for p in sorted(library.glob("*.py")) if 4_000 < p.stat().st_size < 30_000]
    for module in modules[:40]:
        (target / f"{module.stem}.txt").write_text(module.read_text())
    return target


def words(folder: Path, source: Path, **changes: Any) -> list[str]:
    """A recipe of about 100,000 parameters that takes some 20 ms a step."""
    given = {
        "recipe": "m32",
        "model.scale": "debug",
        "model.hidden_size": 32,
        "model.attention_projection_size": 64,
        "model.num_attention_heads": 2,
        "model.num_hidden_layers": 2,
        "model.num_experts": 8,
        "model.moe_intermediate_size": 32,
        # As wide as the published 0.02 is at width 2048; smaller ones leave gradients near AdamW's
        # eps, where rounding decides an update's size.
        "model.initializer_range": 0.16,
        "model.vocab_size": 512,
        "data.source": source,
        "data.workers": 1,
        "train.seq_len": 64,
        "train.batch_tokens": 512,
        "train.micro_batch_size": 2,
        "train.steps": 20,
        "train.warmup_steps": 2,
        "train.lr": 1e-3,
        "train.precision": "fp32",
        "checkpoint.interval": 5,
        "eval.interval": 10,
        "eval.rows": 4,
        "log.wandb": "off",
        "log.plain_every_s": 0,
        "run.dir": folder,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in given.items()]


def command(world: int, words: list[str], verb: str = "train") -> list[str]:
    script = str(ROOT / "launch" / f"{verb}.py")
    if world == 0:  # without torchrun
        return [sys.executable, script, *words]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    return [*run, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *words]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"PTM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(
    world: int, words: list[str], cache: Path, *, verb: str = "train", timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(world, words, verb),
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cache.parent,
    )


def finish(done: subprocess.CompletedProcess[str]) -> str:
    """What a run that ended well has printed."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


TIMES = ("tokens_per_s", "mfu", "memory_bytes", "step_s", "data_s", "communication_s", "compute_s")
TRAFFIC = ("sent_bytes", "pages", "updates", "commits", "tiers")
"""What moved when: it depends on how fast the disk was, and on where a run was begun again."""


def log(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the disk say."""
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in (*TIMES, *TRAFFIC)} for row in rows]


def digests(folder: Path, step: int) -> dict[str, Any]:
    """Hashes of every tensor's rows in a checkpoint, whatever the number of ranks that wrote it."""
    from ptm.checkpoint import manifest

    found = manifest.read(folder / "checkpoints" / f"step-{step:08d}")
    return {
        f"{name} row {piece.first_row}": piece.xxh3_128
        for name in found.census
        for _, piece in found.pieces(name)
    }


def tensors(folder: Path, step: int) -> dict[str, Any]:
    """All tensors of a checkpoint, whole."""
    from ptm.checkpoint.open_model import open_model

    weights = open_model(folder / "checkpoints" / f"step-{step:08d}").weights
    return {f"model.{name}": weights.read(name) for name in weights.names()}

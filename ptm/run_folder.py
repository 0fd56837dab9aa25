"""The run folder: whose it is, whether this command may use it, and what is written at its start.

    runs/m32-mini/  recipe.yaml  plan.txt  env.json  metrics.jsonl  events.jsonl  report.html
                    checkpoints/step-00000120/...   incidents/...

A folder belongs to one run. `resume=auto` goes on from the newest good checkpoint if there is one,
`must` refuses to start without one, `never` refuses a folder that has any; steps of this run in the
page files of engine.ssd_path count as checkpoints. A recipe that would
train another model than the one in the folder, or on other data, is refused by name; what may
change between two starts is listed in FREE.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import ptm
from ptm.checkpoint import manifest
from ptm.checkpoint.folders import step_folders
from ptm.common import env
from ptm.common.errors import CheckpointError, RecipeError, StorageError, line
from ptm.common.parse import schema_of
from ptm.data.rewards import RewardError
from ptm.engine import reshard
from ptm.engine.config import EngineKind
from ptm.engine.open_file import has_commits
from ptm.recipe import Recipe, Resume, dump, load_recipe

T = TypeVar("T")
REWARD_LOG = "reward.log"
FREE = re.compile(
    r"resume|dry_run|recipe|(run|log|checkpoint|eval|engine)\..*"
    r"|data\.(workers|prefetch|cache_dir)|train\.(steps|micro_batch_size|recompute|max_skipped)"
    r"|train\.(lr|min_lr|warmup_steps|schedule|clip)|optim\..*"
)
"""Keys that may differ when a run goes on: how it runs and how fast it learns, not what."""


def claim(recipe: Recipe, stack: ExitStack) -> None:
    """Check that `recipe` may use its run folder, make it, and hold it until `stack` ends.

    For rank 0. Raises RecipeError, CheckpointError, StorageError.
    """
    folder = recipe.run_dir
    checkpoints = folder / "checkpoints"
    has_steps = checkpoints.is_dir() and bool(step_folders(checkpoints))
    has_pages = _has_pages(recipe)
    is_begun = has_steps or has_pages or (folder / "metrics.jsonl").exists()
    if recipe.resume is Resume.never and is_begun:
        remedy = "name another run.dir, or use resume=auto to go on"
        raise RecipeError(line("run.dir", folder, "holds a run already and resume=never", remedy))
    if recipe.resume is Resume.must and not (has_steps or has_pages):
        remedy = "check run.dir, or use resume=auto to start anew"
        raise CheckpointError(line("run.dir", folder, "has no checkpoint and resume=must", remedy))
    if (has_steps or has_pages) and (folder / "recipe.yaml").is_file():
        _refuse_another_run(recipe, folder)
    is_new = not folder.exists()
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        remedy = "name a folder that you may write to"
        raise StorageError(line("run.dir", folder, rule, remedy)) from error
    _hold(folder, stack)
    if is_new:
        stack.push(lambda kind, *_: _remove_if_unused(recipe, kind))


def _has_pages(recipe: Recipe) -> bool:
    """Whether this run has committed steps to the recipe's disk."""
    file, ssd_path = recipe.run_dir / "run_id", recipe.engine.ssd_path
    return (
        ssd_path is not None and file.is_file() and has_commits(ssd_path, file.read_text().strip())
    )


def _hold(folder: Path, stack: ExitStack) -> None:
    # The lock is the kernel's: it goes with its process, however that ends.
    lock = stack.enter_context((folder / ".lock").open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        rule = f"{lock.read().strip() or 'another process'} is training in it"
        remedy = "wait for it, stop it, or name another run.dir"
        raise RecipeError(line("run.dir", folder, rule, remedy)) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()


def _remove_if_unused(recipe: Recipe, kind: type[BaseException] | None) -> None:
    # A start that made the folder and failed before its first step leaves nothing behind, but what
    # a reward that failed has printed.
    folder, log = recipe.run_dir, recipe.run_dir / REWARD_LOG
    is_used = last_logged_step(folder) or step_folders(folder / "checkpoints")
    if kind is not None and issubclass(kind, RewardError) and log.stat().st_size:
        return
    if not (is_used or (folder / "incidents").exists() or _has_pages(recipe)):
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_another_run(recipe: Recipe, folder: Path) -> None:
    flatten = schema_of(Recipe).flatten
    before, now = flatten(load_recipe([f"recipe={folder / 'recipe.yaml'}"])), flatten(recipe)
    for key, new in now.items():
        if before[key] != new and not FREE.fullmatch(key):
            rule = f"the run in {folder} has {key}={before[key]}"
            remedy = "name another run.dir for another run"
            raise RecipeError(line(key, new, rule, remedy))


def identify(folder: Path) -> str:
    """The name of the run in `folder`, for ever; a new one where there is none. For rank 0."""
    file = folder / "run_id"
    if file.is_file():
        return file.read_text().strip()
    for _, step in step_folders(folder / "checkpoints"):
        with contextlib.suppress(CheckpointError):
            _write(file, manifest.read(step).run_id + "\n")
            return identify(folder)
    _write(file, uuid.uuid4().hex + "\n")
    return identify(folder)


def last_logged_step(folder: Path) -> int:
    """The newest step that the run in `folder` has logged; 0 where there is none."""
    tail = 1 << 20
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
        for row in reversed(file.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return int(json.loads(row)["step"])
    return 0


def refuse_to_forget(recipe: Recipe, run_id: str) -> None:
    """Raise CheckpointError where this run's newest step lies in page files that this start does
    not read; else note where its page files are. For rank 0."""
    note = recipe.run_dir / "ssd_path"
    engine = recipe.engine
    if engine.kind is EngineKind.paged and engine.ssd_path is not None:
        _write(note, str(Path(engine.ssd_path).resolve()) + "\n")
        return
    if not note.is_file():
        return
    pages = note.read_text().strip()
    found = reshard.find(pages, run_id, besides="")
    folders = step_folders(recipe.run_dir / "checkpoints")
    newest = max((step for step, _ in folders), default=-1)
    if found is not None and found.step > newest:
        there = f"step {newest}" if newest >= 0 else "nothing"
        rule = (
            f"this run's step {found.step} is in the pages in {pages}, its checkpoints have {there}"
        )
        remedy = "start once with engine.kind=paged and that engine.ssd_path, to save a checkpoint"
        raise CheckpointError(line("engine.ssd_path", engine.ssd_path, rule, remedy))


def settled(folder: Path, key: str, make: Callable[[], T]) -> T:
    """What this run settled on for `key` before, any JSON, or `make()`. For rank 0. Without a
    folder, as in a bench, there is nothing to remember."""
    if not folder.is_dir():
        return make()
    file = folder / "settled.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    if key not in values:
        values[key] = make()
        _write(file, json.dumps(values) + "\n")
    return values[key]


def describe(recipe: Recipe, plan_text: str, kernels: dict[str, str]) -> None:
    """Write recipe.yaml, plan.txt and env.json. Each is replaced whole."""
    folder = recipe.run_dir
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    facts = {
        "ptm": ptm.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "world": env.ranks().world,
        "variables": env.recorded(),
        "kernels": kernels,
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
    }
    _write(folder / "recipe.yaml", dump(recipe))
    _write(folder / "plan.txt", plan_text)
    _write(folder / "env.json", json.dumps(facts, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        remedy = "free space or name another folder"
        raise StorageError(line("run.dir", path, rule, remedy)) from error

"""Turns the files of a source into tokenized, memory-mapped shards in the cache.

A corpus lives under the hash of what it follows from (files by path, size and time of change; the
tokenizer; the format), so a change of any of these makes a new one and none is ever stale:

    <cache>/corpora/<key>/      shard-00000.{tokens,documents,json}, ..., index.json
    <cache>/locks/<key>         held by the one process that builds <key>

It is built in `<key>.partial` by several processes and renamed when complete. Shards that a killed
builder had finished are used again, once their checksum is verified. A finished corpus is verified
whenever it is opened; one with a flipped bit becomes `.partial` again, so that only its bad shards
are made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ptm.common.errors import DataError, line
from ptm.data.child import Child
from ptm.data.config import PYTHON_STDLIB, BadRows, DataConfig
from ptm.data.lock import build_once
from ptm.data.progress import BytesDone
from ptm.data.shard import (
    DOCUMENT_COLUMNS,
    FILES,
    MAX_BAD_SHOWN,
    Totals,
    file_hash,
    read_json,
    write_json,
)
from ptm.data.source import File, Piece, cut
from ptm.data.tokenizer import Tokenizer

FORMAT = 1
MIN_SHARD_BYTES = 4 << 20
MAX_SHARDS = 256
"""Of one source: each is a memory map, and a process may hold about a thousand open files."""
VERIFY_BYTES = 8 << 30
"""Corpora up to this size are hashed whole when opened (3.5 GiB/s a core); larger ones by size."""


class Prepared(NamedTuple):
    """One source on disk: its folder, and the ledger in its index.json."""

    source: str
    folder: Path
    ledger: dict[str, Any]
    was_built: bool


def prepare_source(
    source: str,
    files: list[File],
    config: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    *,
    cache: Path,
    is_builder: bool,
    is_shown: bool,
) -> Prepared:
    """The tokenized corpus of one source, building it if it is not there intact.

    Raises: DataError for too many bad rows (see `DataConfig.bad_rows`) or none that are good, but
    not for those of the interpreter's own files, which are nobody's to mend.
    """
    if source == PYTHON_STDLIB:
        config = replace(config, bad_rows=BadRows.skip, max_bad_fraction=1.0)
    folder = cache / "corpora" / cache_key(FORMAT, files, config.text_key, tokenizer.fingerprint)
    lock = cache / "locks" / folder.name
    lock.parent.mkdir(parents=True, exist_ok=True)

    def finished() -> Prepared | None:
        if not folder.exists() or _damaged_file(folder):
            return None
        ledger = read_json(folder / "index.json")
        return None if ledger is None else Prepared(source, folder, ledger, was_built=False)

    def build() -> Prepared:
        partial = folder.with_suffix(".partial")
        if folder.exists():
            told = f"data: {folder / _damaged_file(folder)} is damaged: making it again"
            print(told, file=sys.stderr, flush=True)
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)
        partial.mkdir(parents=True, exist_ok=True)
        for leftover in partial.glob("*.tmp-*"):
            leftover.unlink()
        ledger = _build(source, files, config, tokenizer, tokenizer_folder, partial, is_shown)
        write_json(partial / "index.json", ledger)
        partial.rename(folder)
        return Prepared(source, folder, ledger, was_built=True)

    prepared = build_once(lock, finished, build, is_builder=is_builder)
    refuse_bad(config, source, Totals(**prepared.ledger["totals"]), prepared.ledger["bad"])
    return prepared


def refuse_bad(
    config: DataConfig, source: str, totals: Totals, bad: list[Any], key: str = "data.source"
) -> None:
    """Raise DataError if a source, which `key` names, has more bad rows than the recipe accepts, or
    nothing else."""
    rows = totals.documents + totals.bad_rows
    first = "".join(f", first {file}:{number}: {reason}" for file, number, reason in bad[:1])
    rule = f"{totals.bad_rows} of {rows} rows of {source} are not usable{first}"
    remedy = "`ptm data check` lists them; mend them"
    if not totals.documents:
        what = "document" if key == "data.source" else "row"
        raise DataError(line(key, source, f"no usable {what} in {rows} rows{first}", remedy))
    if totals.bad_rows and config.bad_rows == BadRows.fail:
        raise DataError(line("data.bad_rows", "fail", rule, f"{remedy}, or set data.bad_rows=skip"))
    if totals.bad_rows > config.max_bad_fraction * rows:
        key, value = "data.max_bad_fraction", config.max_bad_fraction
        raise DataError(line(key, value, rule, f"{remedy}, or raise it"))


def _build(
    source: str,
    files: list[File],
    config: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    partial: Path,
    is_shown: bool,
) -> dict[str, Any]:
    # Returns the ledger once every shard is there.
    shards = list(_group(files))
    paths = [partial / f"shard-{i:05d}" for i in range(len(shards))]
    done = {i: one for i, path in enumerate(paths) if (one := _intact_shard(path)) is not None}
    todo = [i for i in range(len(shards)) if i not in done]

    def request(i: int) -> dict[str, Any]:
        return {
            "shard": str(paths[i]),
            "pieces": shards[i],
            "text_key": config.text_key,
            "tokenizer": str(tokenizer_folder),
        }

    total_bytes = sum(p.size_bytes for i in todo for p in shards[i])
    with BytesDone(f"tokenizing {source}", total_bytes, is_shown=is_shown) as progress:
        for i, summary in _tokenize(todo, request, config, progress.advance):
            done[i] = summary
    bad = list(_bad_rows(shards, done))
    if len(done) < len(shards):  # stopped at the first bad row
        refuse_bad(config, source, _sum(done.values()), bad)
    ids = [np.fromfile(p.with_suffix(".documents"), np.uint64) for p in paths]
    known = np.concatenate(ids).reshape(-1, DOCUMENT_COLUMNS)[:, 2]
    known = known[known > 0]
    return {
        "format": FORMAT,
        "source": source,
        "files": len(files),
        "totals": _sum(done.values())._asdict(),
        "duplicate_ids": len(known) - len(np.unique(known)),
        "bad": bad[:MAX_BAD_SHOWN],
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "shards": [
            {k: done[i][k] for k in ("documents", "tokens", "size_bytes", "xxh3")}
            for i in sorted(done)
        ],
    }


def _tokenize(
    todo: list[int],
    request: Callable[[int], dict[str, Any]],
    config: DataConfig,
    report: Callable[[int], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    # One thread a child process; shards are begun in order, so when one has a bad row and the
    # recipe stops at it, all before it are finished and its line number is known.
    waiting, lock = iter(todo), threading.Lock()
    stop = threading.Event()
    children: list[Child] = []

    def work() -> list[tuple[int, dict[str, Any]]]:
        done = []
        with Child("ptm.data.shard") as child:
            children.append(child)
            while not stop.is_set():
                with lock:
                    i = next(waiting, None)
                if i is None:
                    break
                summary = child.call(request(i), what=f"shard {i}", report=report)
                done.append((i, summary))
                if summary["bad_rows"] and config.bad_rows == BadRows.fail:
                    stop.set()
        return done

    num_workers = min(config.workers or len(os.sched_getaffinity(0)), len(todo))
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        futures = [pool.submit(work) for _ in range(num_workers)]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BaseException:  # also Ctrl-C: do not wait for shards nobody will use
            stop.set()
            for child in children:
                child.process.kill()
            raise


def _group(files: list[File]) -> Iterator[list[Piece]]:
    target = max(MIN_SHARD_BYTES, sum(f.size_bytes for f in files) // MAX_SHARDS)
    shard: list[Piece] = []
    held_bytes = 0
    for piece in cut(files, target):
        shard.append(piece)
        held_bytes += piece.size_bytes
        if held_bytes >= target:
            yield shard
            shard, held_bytes = [], 0
    if shard:
        yield shard


def _bad_rows(
    shards: list[list[Piece]], done: dict[int, dict[str, Any]]
) -> Iterator[tuple[str, int, str]]:
    # With line numbers of the whole file, as far as all pieces before are known.
    lines_before: dict[str, int] = {}
    for i, pieces in enumerate(shards):
        if i not in done:
            return
        for number, at, reason in done[i]["bad"]:
            file = pieces[number].file
            before = sum(done[i]["lines"][j] for j in range(number) if pieces[j].file == file)
            yield file.path, lines_before.get(file.path, 0) + before + at, reason
        for piece, count in zip(pieces, done[i]["lines"]):
            lines_before[piece.file.path] = lines_before.get(piece.file.path, 0) + count


def _intact_shard(path: Path) -> dict[str, Any] | None:
    summary = read_json(path.with_suffix(".json"))
    if summary is None:
        return None
    for suffix in FILES:
        file = path.with_suffix(suffix)
        if not file.exists() or file_hash(file) != summary["xxh3"][suffix]:
            return None
    return summary


def _damaged_file(folder: Path) -> str:
    # The name of the first file that is not what it was when written, or nothing.
    index = read_json(folder / "index.json")
    if index is None:
        return "index.json"
    is_small = (
        sum(size for s in index["shards"] for size in s["size_bytes"].values()) <= VERIFY_BYTES
    )
    for i, shard in enumerate(index["shards"]):
        for suffix in FILES:
            file = folder / f"shard-{i:05d}{suffix}"
            try:
                is_good = file.stat().st_size == shard["size_bytes"][suffix] and (
                    not is_small or file_hash(file) == shard["xxh3"][suffix]
                )
            except FileNotFoundError:  # also when another process has begun to mend it
                is_good = False
            if not is_good:
                return file.name
    return ""


def _sum(summaries: Iterable[dict[str, Any]]) -> Totals:
    totals = Totals()
    for one in summaries:
        totals = totals.plus(Totals(*(one[name] for name in Totals._fields)))
    return totals


def cache_key(*content: Any) -> str:
    """Name in the cache of what follows from `content`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())

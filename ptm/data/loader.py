"""Rows by number, steps of rows, and each rank's share of a step.

A row is found in four steps, each a pure function of (seed, row number):

    1  which source, and which of its rows          Mixture
    2  which epoch of the source, and which row of it, the epoch's rows being in hashed order
    3  tokens [r L, r L + L] of the epoch's stream: its documents in hashed order, end to end
    4  which documents these are: a binary search in the running sum of their lengths

So the state of the data is the step alone. The same rows make up a step on any number of ranks,
with any micro-batch size and however many batches are made ahead; a resumed run goes on at its row.
A few tokens at the end of an epoch that do not fill a row are left out of that epoch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from ptm.common.errors import DataError, line
from ptm.data.corpus import Split, Stream
from ptm.data.mixture import Mixture, permutation
from ptm.data.pack import Batch, pack


class RowId(NamedTuple):
    """Names a row for good: a source of the split, an epoch of it, a row of that epoch."""

    source: int
    epoch: int
    row: int


class _Epoch(NamedTuple):
    documents: np.ndarray
    ends: np.ndarray  # running sum of their lengths
    rows: np.ndarray


class Rows:
    """The endless order of packed rows of a split; `tokens(i)` is row i, in constant memory.

    Raises: DataError when a stream is too short for one row.
    """

    def __init__(self, split: Split, *, seq_len: int, isolate_documents: bool = True) -> None:
        self.split, self.seq_len, self.isolate_documents = split, seq_len, isolate_documents
        self.mixture = Mixture(split.weights, split.seed)
        self.rows_per_epoch = [(s.num_tokens - 1) // seq_len for s in split.streams]
        for stream, num_rows in zip(split.streams, self.rows_per_epoch):
            if not num_rows:
                _refuse_short(split, stream, seq_len)
        # Two epochs of each source: a step can span the end of one.
        self._epoch = functools.lru_cache(maxsize=2 * len(split.streams))(self._make_epoch)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch of all sources."""
        return sum(self.rows_per_epoch)

    def locate(self, index: int) -> RowId:
        source, index = self.mixture.locate(index)
        epoch, index = divmod(index, self.rows_per_epoch[source])
        return RowId(source, epoch, int(self._epoch(source, epoch).rows[index]))

    def tokens(self, index: int) -> np.ndarray:
        """Row `index`: (L + 1,) int64."""
        source, epoch, row = self.locate(index)
        stream, order = self.split.streams[source], self._epoch(source, epoch)
        out = np.empty(self.seq_len + 1, np.int64)
        at = row * self.seq_len
        i = int(np.searchsorted(order.ends, at, side="right"))
        filled = 0
        while filled < len(out):
            document = int(order.documents[i])
            length = int(stream.lengths[document])
            start = at + filled - (int(order.ends[i]) - length)
            stop = min(length, start + len(out) - filled)
            out[filled : filled + stop - start] = stream.read(document, start, stop)
            filled += stop - start
            i += 1
        return out

    def batch(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the order, packed; none gives a batch of no rows."""
        rows = [self.tokens(i) for i in range(start, stop)]
        tokens = np.stack(rows) if rows else np.empty((0, self.seq_len + 1), np.int64)
        return pack(tokens, eod_id=self.split.eod_id, isolate_documents=self.isolate_documents)

    def _make_epoch(self, source: int, epoch: int) -> _Epoch:
        stream, seed = self.split.streams[source], self.split.seed
        documents = permutation(stream.num_documents, seed, source, epoch, 0)
        rows = permutation(self.rows_per_epoch[source], seed, source, epoch, 1)
        return _Epoch(documents, np.cumsum(stream.lengths[documents]), rows)


class RowSource(Protocol):
    """An endless order of rows, as `Rows` is one."""

    def locate(self, index: int) -> RowId: ...

    def batch(self, start: int, stop: int) -> Batch: ...


class Loader:
    """Micro-batches of one rank; a step's rows are those of all ranks together, in rank order.

    Step s is rows [s R, s R + R) for R = `rows_per_step`. Rank r of n takes a contiguous part;
    parts differ by at most one row. `close` it, or use it in a `with`, to end its threads.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        rows_per_step: int,
        rank: int = 0,
        world: int = 1,
        micro_batch_size: int,
        prefetch: int = 0,
    ) -> None:
        """`prefetch` steps are made ahead, in as many threads."""
        self.rows, self.rows_per_step, self.micro_batch_size = rows, rows_per_step, micro_batch_size
        self.first = rows_per_step * rank // world
        self.last = rows_per_step * (rank + 1) // world
        self.num_micro_batches = math.ceil(math.ceil(rows_per_step / world) / micro_batch_size)
        self.prefetch = prefetch
        self.pool = ThreadPoolExecutor(prefetch, "data") if prefetch else None
        self.ahead: dict[int, Future[list[Batch]]] = {}

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step; as many on every rank, so the last may have no row."""
        if self.pool is None:
            return self._make(step)
        wanted = range(step, step + self.prefetch + 1)
        for stale in self.ahead.keys() - set(wanted):
            self.ahead.pop(stale).cancel()
        for s in wanted:
            if s not in self.ahead:
                self.ahead[s] = self.pool.submit(self._make, s)
        return self.ahead.pop(step).result()

    def digest(self, step: int) -> str:
        """sha256 of the names of all rows of a step, over all ranks."""
        first = step * self.rows_per_step
        ids = [self.rows.locate(i) for i in range(first, first + self.rows_per_step)]
        return hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, step: int) -> list[Batch]:
        first = step * self.rows_per_step + self.first
        last = step * self.rows_per_step + self.last
        starts = [first + i * self.micro_batch_size for i in range(self.num_micro_batches)]
        return [self.rows.batch(s, min(s + self.micro_batch_size, last)) for s in starts]


def _refuse_short(split: Split, stream: Stream, seq_len: int) -> None:
    rule = (
        f"a row takes {seq_len + 1} tokens, and the {split.name} split of {stream.name} has "
        f"{stream.num_tokens} in {stream.num_documents} documents"
    )
    larger = "raise data.eval_fraction, " if split.name == "held-out" else ""
    remedy = f"add text, {larger}or set train.seq_len to {max(stream.num_tokens - 1, 1)} or less"
    raise DataError(line("train.seq_len", seq_len, rule, remedy))

"""What a schedule depends on beside its trace: frames, the disk's rates, policy, commits.

Kept beside the trace of a run, so that `ptm plan RUN_FOLDER` can plan the same step anew, or ask
what more memory or another policy would do.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ptm.common.errors import DataError, line
from ptm.engine.config import PolicyKind
from ptm.engine.schedule import Schedule, make_schedule
from ptm.engine.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Of one rank. `scratch_kind` names the pages that hold nothing between steps."""

    num_frames: int
    page_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    policy: PolicyKind
    commits: bool
    "Whether a commit follows every step."
    scratch_kind: str = "grads"

    def schedule(self, trace: Trace) -> Schedule:
        """Raises OutOfPages where the frames cannot hold what is in hand at once."""
        scratch, first = range(0), 0
        for name, stop in trace.kinds:
            if name == self.scratch_kind:
                scratch = range(first, stop)
            first = stop
        return make_schedule(
            trace,
            num_frames=self.num_frames,
            page_bytes=self.page_bytes,
            read_bytes_per_s=self.read_bytes_per_s,
            write_bytes_per_s=self.write_bytes_per_s,
            policy=self.policy,
            scratch=scratch,
            commits=self.commits,
        )

    def with_policy(self, policy: PolicyKind) -> Terms:
        return replace(self, policy=policy)

    def with_frames(self, num_frames: int) -> Terms:
        return replace(self, num_frames=num_frames)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self) | {"policy": self.policy.value}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Terms:
        """Read what `save` wrote. Raises DataError when it is something else."""
        try:
            found = json.loads(path.read_text())
            terms = cls(**found | {"policy": PolicyKind(found["policy"])})
            numbers = (terms.num_frames, terms.page_bytes)
            rates = (terms.read_bytes_per_s, terms.write_bytes_per_s)
            assert all(isinstance(n, int) and n > 0 for n in numbers)
            assert all(isinstance(r, (int, float)) and r > 0 for r in rates)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            rule = "does not hold the terms of a schedule"
            raise DataError(line("terms", path, rule, "let the run end or stop again")) from error
        return terms

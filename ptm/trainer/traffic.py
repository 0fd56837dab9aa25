"""What one step sent, moved and waited for: differences of what the engine counts since its start.

    traffic = Traffic(engine.report)
    traffic.take()    # {"sent_bytes": {"gather": 1048576}, "pages": {"reads": 12, "misses": 2}}

One object for each group, in which nothing is zero, so that a run whose states all lie in memory
has short lines. Numbers are those of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Groups = dict[str, dict[str, float]]

_PREFIXES = {
    "pages_": "pages",
    "commit_": "commits",
    "tier_": "tiers",
    "update_": "updates",
    "updates_": "updates",
}
_PAGES = ("reads", "writes", "read_bytes", "write_bytes", "hits", "misses", "waited_s")
_LATE = ("late_steps_mean", "late_steps_most")


class Traffic:
    """Made when the loop begins, which counts as the first `take`."""

    def __init__(self, report: Callable[[], Mapping[str, float]]) -> None:
        self._report = report
        self._before = dict(report())

    def take(self) -> Groups:
        """What happened since the last call, and how things are now where that is of use."""
        found: Groups = {}
        now = dict(self._report())
        for name, value in now.items():
            group, key = _place(name)
            is_state = group == "tiers" or name in _LATE
            amount = _short(value if is_state else value - self._before.get(name, 0.0))
            # Lateness is said whenever it is counted: none is news.
            if group and (amount or name in _LATE):
                found.setdefault(group, {})[key] = amount
        self._before = now
        if not found.get("pages", {}).keys() - {"hits"}:
            found.pop("pages", None)  # nothing moved
        return found


def _place(name: str) -> tuple[str, str]:
    """The group of a number of the engine, and its name there; "" where it is of no use."""
    if name in _LATE:
        return "updates", name
    for prefix, group in _PREFIXES.items():
        if name.startswith(prefix):
            key = name.removeprefix(prefix)
            return (group if group != "pages" or key in _PAGES else ""), key
    return ("sent_bytes", name.removesuffix("_bytes")) if name.endswith("_bytes") else ("", "")


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else round(value, 4)

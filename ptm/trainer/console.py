"""The run on the console: a live bar and expert heat map on a terminal, plain lines elsewhere.

    step 120/2000 loss 5.1234 gnorm 0.41 lr 3.0e-04 tok/s 8,412 mfu 21.2% mem 1.3G \
exp[max 1.9x dead 0] eta 00:12:03

Both show the same words from the same record, and both print a whole line for steps worth keeping:
the first, the last, evaluated and skipped ones. The time left is the mean of the last 50 steps
times the steps to go.
"""

from __future__ import annotations

import io
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ptm.common.units import format_bytes, format_duration, short_bytes

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from ptm.trainer.metrics import LogConfig

Record = Mapping[str, Any]
_HEAT_ROWS = 8  # layers in the live heat map: the least even ones


class Console(Protocol):
    """What Metrics needs of a display."""

    def step(self, step: int, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def ledger(self, steps: int, collectives: Mapping[str, Record]) -> None: ...

    def close(self) -> None: ...


def open_console(log: LogConfig, *, total_steps: int, start_step: int) -> Console:
    kind = log.progress.value
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    if kind == "rich":
        return RichConsole(total_steps, start_step)
    return PlainConsole(total_steps, every_s=log.plain_every_s) if kind == "plain" else NoConsole()


class Pace:
    """Where the run stands: time left, and whether a step is worth a line of its own."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._seen: deque[tuple[int, float]] = deque([], maxlen=51)
        self._skipped = 0

    def after(self, step: int, record: Record) -> tuple[str, bool]:
        """The time left as text, and whether this step is the first, last, evaluated or skipped."""
        is_first, skipped = not self._seen, int(record.get("skipped") or 0)
        is_notable = is_first or step >= self._total or "eval_loss" in record
        is_notable = is_notable or skipped > self._skipped
        self._skipped = skipped
        self._seen.append((step, time.monotonic()))
        (first, began), (last, ended) = self._seen[0], self._seen[-1]
        if last <= first:
            return "--:--:--", is_notable
        left_s = (ended - began) / (last - first) * (self._total - last)
        return format_duration(left_s), is_notable


class NoConsole:
    """The display of `log.progress=off`."""

    def step(self, step: int, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def ledger(self, steps: int, collectives: Mapping[str, Record]) -> None: ...

    def close(self) -> None: ...


class PlainConsole:
    """Notable steps, and between them at most one line in `every_s` seconds."""

    def __init__(self, total_steps: int, *, every_s: float) -> None:
        self._total = total_steps
        self._every_s = every_s
        self._shown_at = -float("inf")
        self._pace = Pace(total_steps)

    def step(self, step: int, record: Record) -> None:
        eta, is_notable = self._pace.after(step, record)
        now = time.monotonic()
        if is_notable or now - self._shown_at >= self._every_s:
            self._shown_at = now
            print(step_line(step, self._total, record, eta), flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def ledger(self, steps: int, collectives: Mapping[str, Record]) -> None:
        from rich.console import Console

        out = io.StringIO()
        plain = Console(file=out, width=100, no_color=True, legacy_windows=False)
        plain.print(ledger_table(steps, collectives))
        print("\n".join(text.rstrip() for text in out.getvalue().splitlines()), flush=True)

    def close(self) -> None: ...


class RichConsole:
    """A bar at the bottom of the terminal, the step's numbers and the expert load under it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total = total_steps
        self._pace = Pace(total_steps)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(None),
            TextColumn("eta {task.fields[eta]}"),
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta="--:--:--")
        self._live = Live(self._bar, refresh_per_second=4)
        self._live.start()

    def step(self, step: int, record: Record) -> None:
        from rich.console import Group
        from rich.text import Text

        eta, is_notable = self._pace.after(step, record)
        self._bar.update(self._task, completed=step, eta=eta)
        words = Text(" ".join(step_words(record)))
        self._live.update(Group(self._bar, words, *heat_rows(record)))
        if is_notable:
            self.note(step_line(step, self._total, record, eta))

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def ledger(self, steps: int, collectives: Mapping[str, Record]) -> None:
        self._live.console.print(ledger_table(steps, collectives))

    def close(self) -> None:
        self._live.stop()


def step_line(step: int, total_steps: int, record: Record, eta: str) -> str:
    """The greppable line of one step."""
    return " ".join([f"step {step}/{total_steps}", *step_words(record), f"eta {eta}"])


# key of the record -> word on the line, and how its number is written
_WORDS = {
    "loss": ("loss", "{:.4f}".format),
    "reward": ("reward", "{:.3f}".format),
    "equal_groups": ("equal", "{:.2f}".format),
    "reward_raised": ("raised", "{:.0f}".format),
    "reward_hung": ("hung", "{:.0f}".format),
    "accuracy": ("accuracy", "{:.3f}".format),
    "eval_loss": ("eval_loss", "{:.4f}".format),
    "eval_bits_per_byte": ("bits/byte", "{:.4f}".format),
    "grad_norm": ("gnorm", "{:.2f}".format),
    "lr": ("lr", "{:.1e}".format),
    "tokens_per_s": ("tok/s", "{:,.0f}".format),
    "mfu": ("mfu", "{:.1%}".format),
    "memory_bytes": ("mem", short_bytes),
}


_FAILURES = ("reward_raised", "reward_hung")
"On the line only where there are some."


def step_words(record: Record) -> list[str]:
    words = []
    for key, (word, write) in _WORDS.items():
        if key in record and (key not in _FAILURES or record[key]):
            value = record[key]
            words.append(f"{word} {write(value) if isinstance(value, (int, float)) else 'nan'}")
    loads = list(_loads(record).values())
    if loads:
        most = max(load["max_over_mean"] for load in loads)
        words.append(f"exp[max {most:.1f}x dead {sum(load['dead'] for load in loads)}]")
    words += page_words(record)
    if record.get("skipped"):
        words.append(f"skipped {record['skipped']}")
    return words


def page_words(record: Record) -> list[str]:
    """Pages a second where they move, and by how many steps weights are late where they may be."""
    words, pages, updates = [], record.get("pages"), record.get("updates")
    step_s = record.get("step_s")
    if isinstance(pages, Mapping) and isinstance(step_s, (int, float)) and step_s > 0:
        reads, writes = (pages.get(key, 0) / step_s for key in ("reads", "writes"))
        if reads or writes:
            words.append(f"pages/s[read {reads:,.0f} write {writes:,.0f}]")
    if isinstance(updates, Mapping) and "late_steps_mean" in updates:
        mean, most = updates["late_steps_mean"], updates.get("late_steps_most", 0)
        words.append(f"late[mean {mean:.2f} most {most:.0f}]")
    return words


def ledger_table(steps: int, collectives: Mapping[str, Record]) -> Table:
    """What this rank sent with each collective, beside the least that any algorithm must send."""
    from rich import box
    from rich.table import Table

    words = f"sent by rank 0 in {steps:,} steps and evaluations"
    table = Table(title=words, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("collective", no_wrap=True)
    for name in ("calls", "sent", "bound", "sent / bound", "waited"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ledger_rows(collectives):
        table.add_row(*row)
    return table


def ledger_rows(collectives: Mapping[str, Record]) -> list[tuple[str, ...]]:
    keys = ("calls", "sent_bytes", "bound_bytes", "waited_s")
    costs = {name: tuple(cost[key] for key in keys) for name, cost in collectives.items()}
    if len(costs) > 1:
        costs["all"] = tuple(map(sum, zip(*costs.values())))
    return [
        (
            name,
            f"{calls:,}",
            format_bytes(sent),
            format_bytes(bound),
            f"{sent / bound:.3f}" if bound else "-",
            f"{waited:,.2f} s",
        )
        for name, (calls, sent, bound, waited) in costs.items()
    ]


def heat_rows(record: Record) -> list[Text]:
    """A line a layer, a cell an expert: red above its fair share, blue below, a dot for nothing."""
    from rich.text import Text

    loads = sorted(_loads(record).items(), key=lambda item: -item[1]["max_over_mean"])[:_HEAT_ROWS]
    rows = []
    for layer, load in sorted(loads, key=lambda item: int(item[0])):
        text = Text(f"layer {layer:>3} ")
        for share in load["share"]:
            text.append("█" if share else "·", style=_heat(share * len(load["share"])))
        text.append(f" max {load['max_over_mean']:.1f}x dead {load['dead']}")
        text.append(f" entropy {load['entropy']:.3f}")
        rows.append(text)
    return rows


def _heat(over_mean: float) -> str:
    bounds = ((0.25, "blue"), (0.6, "cyan"), (1.5, "bright_black"), (2.5, "yellow"))
    return next((colour for most, colour in bounds if over_mean <= most), "red")


def _loads(record: Record) -> Mapping[str, Any]:
    loads = record.get("expert_load")
    return loads if isinstance(loads, Mapping) else {}

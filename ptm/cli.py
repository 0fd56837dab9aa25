"""The door: `ptm VERB key=value ...`, and launch/VERB.py, which torchrun starts once per rank.

A verb is a row of VERBS; what it imports is loaded when it is asked for, so a wrong word is
answered in well under a second. Every failure ends here, as one line on stderr and an exit code
(ptm/common/errors.py). With several ranks:

- an error in the words or the recipe, and a stop with everything saved, are the same on every
  rank. Rank 0 prints them; the others wait until it has, because torchrun's agent ends all ranks as
  soon as one has left, and leave with the same code in silence;
- an error of the job that ptm foresaw is most often the same everywhere too, so other ranks give
  rank 0 a few seconds to print it; if it does not, they print it behind `[rank/world]`;
- anything else is printed by each rank it happens to, at once. Its full trace goes to a file.

A rank tells that it has spoken by a file in the folder that the agent made for this start; one that
has only lost a peer says nothing more then, and rank 0 waits a little to learn of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ptm
from ptm.common import env, incident
from ptm.common.errors import HangError, PtmError, RecipeError, Requeue, Stopped, line
from ptm.common.near import nearest

EXIT_OUT_OF_MEMORY = 71
EXIT_DISK = 74
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

SAME_EVERYWHERE_S = 30.0  # how long a rank waits at most for rank 0 to print the same error
MAYBE_MINE_S = 5.0  # and an error that may be its own

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


class Verb(NamedTuple):
    """One verb: its parts are named `module:attribute` and loaded late."""

    summary: str
    config: str
    job: str
    "Called with the config; returns an exit code or None."
    positionals: tuple[str, ...] = ()
    others: dict[str, tuple[str, str]] = {}
    "First word -> the config that it has instead, and that one's positionals."
    absent: dict[str, str] = {}
    "What people give that is no key -> what to do instead."

    def told(self, words: list[str]) -> Verb:
        """This verb as its first word makes it."""
        if not words or words[0] not in self.others:
            return self
        config, positional = self.others[words[0]]
        return self._replace(config=config, positionals=tuple(positional.split()))


VERBS = {
    "train": Verb("Train a recipe.", "ptm.recipe:Recipe", "ptm.build:train"),
    "plan": Verb(
        "Show what a recipe needs on this machine, and whether it fits.",
        "ptm.jobs:PlanJob",
        "ptm.verbs:plan",
        ("trace",),
        {"export": ("ptm.jobs:PlanExportJob", "action")},
    ),
    "eval": Verb(
        "Held-out loss, perplexity and bits per byte.",
        "ptm.jobs:EvalJob",
        "ptm.verbs:evaluate",
        ("run",),
    ),
    "generate": Verb("Continue a prompt.", "ptm.jobs:GenerateJob", "ptm.verbs:generate", ("run",)),
    "convert": Verb(
        "Published checkpoints to ptm's and back, bit for bit.",
        "ptm.export.config:ConvertConfig",
        "ptm.export.convert:convert",
        ("source", "out"),
        absent={"merge": "leave it out: an adapter is merged, and to=peft writes it alone"},
    ),
    "export": Verb(
        "Quantize a model: GPTQ int4 and int8, FP6, in files that others read.",
        "ptm.export.config:ExportConfig",
        "ptm.verbs_export:export",
        ("run",),
        {"verify": ("ptm.export.config:VerifyConfig", "action export run")},
    ),
    "data": Verb(
        "Prepare, check or show the text or rows of a recipe.",
        "ptm.jobs:DataJob",
        "ptm.verbs_data:data",
        ("action",),
    ),
    "report": Verb(
        "One HTML file about a run.", "ptm.jobs:ReportJob", "ptm.verbs:report", ("run",)
    ),
    "bench": Verb(
        "Measure: router, updates, engines, experts, train, wire, tiers, kernels, decode, gptq "
        "(ptm bench train --help).",
        "ptm.jobs:BenchJob",
        "ptm.verbs:bench",
        ("name",),
        {
            name: ("ptm.jobs:StepBenchJob", "bench")
            for name in ("engines", "experts", "train", "wire", "tiers")
        }
        | {"kernels": ("ptm.jobs:KernelBenchJob", "bench")}
        | {"decode": ("ptm.jobs:DecodeBenchJob", "bench run exports")}
        | {"gptq": ("ptm.jobs:GptqBenchJob", "bench")},
    ),
}


def main(words: list[str] | None = None) -> NoReturn:
    """Run one verb and leave with its exit code; `words` are those after `ptm`."""
    code = run(sys.argv[1:] if words is None else words)
    sys.stdout.flush()
    sys.stderr.flush()
    if code or "torch" in sys.modules:
        # A thread may never end after a failure, and gloo's abort an interpreter that shuts down: 1
        # in 8 after a DeviceMesh (docs/log.md). All that must be closed is.
        os._exit(code)
    sys.exit(code)


def run(words: list[str]) -> int:
    """Run one verb; every failure is printed, none is raised. Returns the exit code."""
    is_started = False
    try:
        job = _parse(words)
        is_started = True
        code = job() or 0
        sys.stdout.flush()
        return code
    except Exception as e:
        if isinstance(e, BrokenPipeError) and _is_stdout_closed():
            return EXIT_BROKEN_PIPE
        code, message = _describe(e)
        is_same = not is_started or isinstance(e, Requeue)
        maybe_mine_s = MAYBE_MINE_S if isinstance(e, PtmError) else 0.0
        wait_s = SAME_EVERYWHERE_S if is_same else maybe_mine_s
        if isinstance(e, Stopped):
            wait_s = 0.0
        late_s = MAYBE_MINE_S + 1.0 if isinstance(e, HangError) else 0.0
        if isinstance(e, HangError | Stopped) and _does_another_say_why(late_s):
            return code
        _complain(message, code, wait_s=wait_s, is_same=is_same)
        return code
    except KeyboardInterrupt:
        message = line("signal", "SIGINT", "interrupted, nothing more was saved", "start it again")
        _complain(message, EXIT_INTERRUPTED, wait_s=MAYBE_MINE_S, is_same=True)
        return EXIT_INTERRUPTED


def _parse(words: list[str]) -> Callable[[], int | None]:
    """What the words ask for, as a call."""
    if not words or words[0] in ("-h", "--help"):
        return functools.partial(_show, _overview())
    if words[0] == "--version":
        return functools.partial(_show, f"ptm {ptm.__version__}")
    name, *rest = words
    if name not in VERBS:
        near = nearest(name, VERBS)
        guess = f"ptm train {name}" if "=" in name else f"ptm {near[0] if near else '--help'}"
        rule = f"no such verb, there are {', '.join(VERBS)}"
        raise RecipeError(line("verb", name, rule, f"did you mean {guess}?"))
    verb = VERBS[name].told(rest)
    if "-h" in rest or "--help" in rest:
        return functools.partial(_show, _page(name, verb))
    config = _config(verb, rest)
    return lambda: _do(verb, config)  # its imports are part of the job


def _do(verb: Verb, config: Any) -> int | None:
    load("ptm.kernels.native:check_switches")()  # before anything that takes long, or is shown
    return load(verb.job)(config)


def _config(verb: Verb, words: list[str]) -> Any:
    from ptm.common.parse import Names, schema_of
    from ptm.recipe import Recipe, load_recipe

    cls = load(verb.config)
    if issubclass(cls, Recipe):
        return load_recipe(words, cls=cls, positionals=verb.positionals, say=_show)
    schema = schema_of(cls)
    names = Names(absent=verb.absent)
    return schema.build(schema.words(words, positionals=verb.positionals, names=names))


def load(target: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _overview() -> str:
    from ptm.recipe_files import shipped

    width = max(map(len, VERBS))
    lines = [
        "usage: ptm VERB [key=value ...]",
        "       torchrun --nproc-per-node N launch/VERB.py [key=value ...]",
        "",
        *(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        f"recipes: {', '.join(shipped())}",
        "ptm VERB --help lists every key of a verb.",
    ]
    return "\n".join(lines)


def _page(name: str, verb: Verb) -> str:
    from ptm.common.help import help_text
    from ptm.common.parse import schema_of
    from ptm.recipe import NAMES, Recipe

    cls = load(verb.config)
    is_recipe = issubclass(cls, Recipe)
    summary = verb.summary
    if is_recipe:
        summary += (
            " Defaults below are those of the code; a recipe and its scale lie over them,"
            " and words over both. dry_run=true shows what comes out."
        )
    return help_text(
        schema_of(cls),
        usage=" ".join(["ptm", name, *_shown(cls, verb.positionals), "[key=value ...]"]),
        summary=summary,
        aliases=NAMES.aliases if is_recipe else None,
    )


def _shown(cls: type, positionals: tuple[str, ...]) -> list[str]:
    """Positionals as a usage line shows them: in brackets where they have a default."""
    from ptm.common.parse import schema_of

    found = schema_of(cls).settings
    is_needed = [found[key].default is dataclasses.MISSING for key in positionals]
    return [p.upper() if needed else f"[{p.upper()}]" for p, needed in zip(positionals, is_needed)]


def _show(text: str) -> None:
    if env.ranks().rank == 0:
        print(text, flush=True)


def _describe(error: Exception) -> tuple[int, str]:
    """The exit code and the line of an error."""
    if isinstance(error, PtmError):
        return error.exit_code, str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    for e in _causes(error):
        text = str(e).lower()
        if (
            isinstance(e, MemoryError)
            or type(e).__name__ == "OutOfMemoryError"
            or (isinstance(e, OSError) and e.errno == errno.ENOMEM)
            or "can't allocate memory" in text
            or "out of memory" in text
        ):
            remedy = "lower train.micro_batch_size or set train.recompute=block (see ptm plan)"
            return EXIT_OUT_OF_MEMORY, line("memory", first, "out of memory", remedy)
        if isinstance(e, OSError) and e.errno in _DISK_ERRORS:
            what = e.filename if e.filename is not None else first
            rule = f"cannot be read or written ({e.strerror})"
            return EXIT_DISK, line("file", what, rule, "check space and permissions")
        if "no space left on device" in text:  # from Rust and C++ libraries
            return EXIT_DISK, line("disk", first, "is full", "make space, then resume=auto")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ptm"):
        rule = "is not installed"
        return PtmError.exit_code, line("module", error.name, rule, f"pip install {error.name}")
    remedy = f"the full trace is in {incident.write_trace(error)}"
    shown = f"{type(error).__name__}({first})"
    return PtmError.exit_code, line("error", shown, "ptm did not expect this", remedy)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    e: BaseException | None = error
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__
    return chain


def _complain(message: str, code: int, *, wait_s: float = 0.0, is_same: bool = False) -> None:
    """Print the one line of a failure, as the module's docstring says for several ranks."""
    me = env.ranks()
    folder = env.folder_of_ranks()
    said = folder / "rank-0-said-why" if folder else None
    if me.rank:
        is_with_rank_0 = me.rank == me.local_rank  # under the same agent
        if is_with_rank_0 and _rank_0_speaks(said, wait_s, code) or is_same:
            return
        message = f"[{me.rank}/{me.world}] {message}"
    print(message, file=sys.stderr, flush=True)
    if folder is not None:
        with contextlib.suppress(OSError):  # the others then wait for their time
            (folder / f"rank-{me.rank}-said-why").touch()


def _does_another_say_why(late_s: float) -> bool:
    """Whether a rank of this start has printed why it left: that others have lost it, or were ended
    for it, is no news. Rank 0 gives them `late_s`, as they give it time; less if the agent ends it.
    """
    folder, me = env.folder_of_ranks(), env.ranks()
    if folder is None:
        return False
    ends = time.monotonic() + (0.0 if me.rank else late_s)
    is_ended = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: is_ended.set())
    mine = f"rank-{me.rank}-said-why"
    while not (found := any(f.name != mine for f in folder.glob("rank-*-said-why"))):
        if is_ended.is_set() or time.monotonic() >= ends:
            break
        is_ended.wait(0.05)
    return found


def _rank_0_speaks(said: Path | None, wait_s: float, code: int) -> bool:
    """Wait until rank 0 has printed its own failure; False if it did not in time.

    Only an agent ends a rank for another one's sake, so there is nothing to wait for without one.
    """
    if said is None:
        return False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # rank 0 is gone
    ends = time.monotonic() + wait_s
    while time.monotonic() < ends:
        if said.exists():
            return True
        time.sleep(0.05)
    return False


def _is_stdout_closed() -> bool:
    # A broken pipe may be any pipe. If it is stdout (`ptm ... | head`), point it elsewhere, so that
    # the interpreter does not fail on it again when it ends.
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_closed

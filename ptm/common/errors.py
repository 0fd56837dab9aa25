"""What can go wrong, in the words of the person who has to mend it.

Every error a user can cause carries one line `key=value: rule; remedy`, and the exit code a
scheduler can act on (sysexits where one fits). Mistakes that only ptm's own code can make are
`assert`s.

    2 recipe or usage     4 bad or untrusted data or checkpoint    71 out of memory
    3 does not fit       70 internal error or hang                 74 disk
                         75 saved, requeue me                      76 diverged
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

EXIT_INTERNAL = 70


class PtmError(Exception):
    """Base of all errors meant for people; `exit_code` is what the process leaves with."""

    exit_code = EXIT_INTERNAL


class RecipeError(PtmError, ValueError):
    """A recipe, a key on the command line, or the usage of a verb is wrong."""

    exit_code = 2


class PlanError(PtmError, ValueError):
    """The run does not fit on this machine."""

    exit_code = 3


class DataError(PtmError, ValueError):
    """A data file, tokenizer or chat template is unusable."""

    exit_code = 4


class CheckpointError(PtmError, ValueError):
    """A checkpoint or model folder is missing, damaged, of another model, or not to be trusted."""

    exit_code = 4


class KernelError(PtmError, RuntimeError):
    """A kernel was asked for something it cannot do, or a backend is missing."""


class HangError(PtmError, RuntimeError):
    """A rank waited longer than its timeout, or a peer is gone."""


class OutOfPages(PtmError, RuntimeError):
    """A memory tier is full."""

    exit_code = 71


class StorageError(PtmError, OSError):
    """The disk is full or failing."""

    exit_code = 74


class Requeue(PtmError):
    """The run was asked to stop and has saved its state: start it again to go on."""

    exit_code = 75


class Stopped(Requeue):
    """The same where nothing had to be saved first. Ranks do not wait for each other to say so: the
    others learn of it from one that has left."""


class DivergedError(PtmError, ArithmeticError):
    """Too many steps in a row had non-finite gradients."""

    exit_code = 76


def line(key: str, value: Any, rule: str, remedy: str) -> str:
    """The house's one-line message, `key=value: rule; remedy`; long values are cut at 80."""
    shown = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    shown = shown.encode("unicode_escape").decode("ascii") if not shown.isprintable() else shown
    return f"{key}={shown}: {rule}; {remedy}"


@contextmanager
def as_typed(names: Mapping[str, str]) -> Iterator[None]:
    """Have an error inside name what was typed: key of its message -> key on the command line.
    Dotted keys are found in its rule and remedy too."""
    try:
        yield
    except PtmError as error:
        key, equals, rest = str(error).partition("=")
        told = f"{names.get(key, key)}{equals}{rest}"
        for name, typed in names.items():
            told = told.replace(name, typed) if "." in name else told
        raise type(error)(told) from None

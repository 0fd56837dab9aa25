"""`--help` of a verb: every key with its type, range, default and meaning, by section.

All of it is read from the config classes, so a setting added there appears here and nowhere
needs to be written twice.
"""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from ptm.common.config import Setting, settings
from ptm.common.parse import Schema
from ptm.common.values import describe, show, unwrap


def help_text(
    schema: Schema[Any],
    *,
    usage: str,
    summary: str,
    aliases: Mapping[str, str] | None = None,
    columns: int | None = None,
) -> str:
    """The page as text; `columns` is the terminal's width if not given."""
    columns = max(60, min(columns or shutil.get_terminal_size((100, 24)).columns, 120))
    meanings = _meanings(schema)
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary, columns)]
    section = None
    for key, setting in schema.settings.items():
        if (own := key.rpartition(".")[0]) != section:
            section = own
            lines += ["", f"{section or 'what to run'}:"]
        lines.append(f"  {key}=  {_rule(setting, is_prose=key in schema.prose)}")
        lines += textwrap.wrap(
            meanings[key], columns, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    if aliases:
        lines += ["", "also accepted, with a notice:"]
        pairs = ", ".join(f"{other} = {key}" for other, key in aliases.items())
        lines += textwrap.wrap(
            pairs, columns, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _rule(setting: Setting, *, is_prose: bool) -> str:
    kind, is_optional = unwrap(setting.type)
    rule = "any text" if is_prose else describe(kind)
    rule += f" {setting.range}" if setting.range else ""
    words = [f"{rule} or null" if is_optional else rule]
    if setting.default is dataclasses.MISSING:
        words.append("required")
    else:
        words.append(f"default {show(setting.default) or 'empty'}")
    return ", ".join(words)


def _meanings(schema: Schema[Any]) -> dict[str, str]:
    # The strings under inherited fields stand in the class that declares them.
    found = {}
    for prefix, cls in [("", schema.cls), *((k + ".", c) for k, c in schema.sections.items())]:
        for owner in reversed(cls.__mro__):
            if dataclasses.is_dataclass(owner):
                found.update({prefix + s.name: s.meaning for s in settings(owner) if s.meaning})
    return {key: found.get(key, "") for key in schema.settings}

"""The files of a recipe: what a name finds, what a file builds on, and its scales.

A recipe is a shipped name (`m32`) or the path of a .yaml file. `base:` in a file is a shipped
name, or a .yaml file in the same folder or below; a chain that leaves the folder or comes back
to itself is refused. `scales:` maps a scale to a part of a recipe, which lies over the rest of
its own file when that scale is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ptm.common import strict_yaml
from ptm.common.errors import RecipeError, line
from ptm.common.near import nearest
from ptm.common.parse import Layer, Schema
from ptm.common.strict_yaml import Mapping, Node, error_at, is_file, text_of
from ptm.common.values import Mismatch, from_node

SUFFIXES = (".yaml", ".yml")
MAX_BASES = 8


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with ptm."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):  # installed; a checkout
        found = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


class RecipeFile(NamedTuple):
    """One file: its keys, its scales, and what it builds on."""

    layer: Layer
    scales: dict[str, Layer]
    base: str | None
    base_where: str


def read_chain(schema: Schema[Any], recipe: str, *, scales: list[str]) -> list[RecipeFile]:
    """The files of a recipe, the deepest base first; `scales` are the scales there may be."""
    path = _find(recipe)
    files: list[RecipeFile] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        file = _read(schema, path, scales)
        files.insert(0, file)
        if file.base is None:
            return files
        base = _find_base(file.base, path, file.base_where)
        if base.resolve() in seen:
            rule = "builds on itself"
            raise error_at(file.base_where, "base", file.base, rule, "break the circle")
        if len(seen) > MAX_BASES:
            rule = f"is more than {MAX_BASES} recipes away"
            raise error_at(file.base_where, "base", file.base, rule, "shorten the chain")
        path = base


def _find(recipe: str) -> Path:
    names = shipped()
    if recipe in names:
        return names[recipe]
    if recipe.endswith(SUFFIXES):
        return Path(recipe)
    rule = f"no such recipe, shipped are {', '.join(names)}"
    near = nearest(recipe, names)
    remedy = f"did you mean {near[0]}?" if near else "or give the path of a .yaml file"
    if is_file(Path(recipe + ".yaml")):
        remedy = f"did you mean {recipe}.yaml?"
    raise RecipeError(line("recipe", recipe, rule, remedy))


def _find_base(base: str, path: Path, where: str) -> Path:
    names = shipped()
    if base in names:
        return names[base]
    folder = path.resolve().parent
    found = (folder / base).resolve()  # also through links
    if not base.endswith(SUFFIXES):
        rule = f"is neither a shipped recipe ({', '.join(names)}) nor a .yaml file"
    elif not found.is_relative_to(folder):
        rule = "is outside of the folder of this recipe"
    elif not is_file(found):
        rule = "no such file"
    else:
        return found
    remedy = "name a shipped recipe or a .yaml file beside this one"
    raise error_at(where, "base", base, rule, remedy)


def _read(schema: Schema[Any], path: Path, known: list[str]) -> RecipeFile:
    tree = strict_yaml.read_file(path)
    name = f"recipes/{path.name}" if path in shipped().values() else str(path)
    entries = dict(tree.entries)
    base, where, scales = None, "", {}
    if "base" in entries:
        number, node = entries.pop("base")
        where = f"{name}:{number}"
        try:
            base = from_node(node, str)
        except Mismatch as e:
            raise error_at(where, "base", text_of(node), e.rule, e.remedy) from None
    if "scales" in entries:
        number, node = entries.pop("scales")
        scales = _read_scales(schema, node, name, number, known)
    layer = schema.file(tree._replace(entries=entries), name, extra=("base", "scales"))
    return RecipeFile(layer, scales, base, where)


def _read_scales(
    schema: Schema[Any], node: Node, name: str, number: int, known: list[str]
) -> dict[str, Layer]:
    names = ", ".join(known)
    if not isinstance(node, Mapping):
        rule = f"must be a mapping of {names}"
        raise error_at(f"{name}:{number}", "scales", text_of(node), rule, "see recipes/README.md")
    found = {}
    for scale, (number, part) in node.entries.items():
        if scale not in known or not isinstance(part, Mapping):
            rule = f"must be a part of a recipe under one of {names}"
            near = nearest(scale, known)
            remedy = f"did you mean {near[0]}?" if near else "see recipes/README.md"
            raise error_at(f"{name}:{number}", f"scales.{scale}", text_of(part), rule, remedy)
        found[scale] = schema.file(part, name)
        for key in ("recipe", "model.scale"):
            if key in found[scale]:
                value, where = found[scale][key]
                rule = "a scale cannot choose this"
                raise error_at(where, f"scales.{scale}.{key}", value, rule, "remove it")
    return found

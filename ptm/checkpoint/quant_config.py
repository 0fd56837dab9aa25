"""quantization_config of an export's config.json: which linears are on which grid, both ways.

    gptq                bits, group_size, sym, checkpoint_format; `dynamic` for what differs:
                        "+:REGEX": {bits, group_size}, "-:REGEX": {} for what is left as it is
    compressed-tensors  config_groups {weights {num_bits, group_size, symmetric}, targets}, ignore
    fp6                 kind, group_size

What a file stores for a linear is told by its tensors (ptm/quant/pack.py), so only numbers that
they do not tell are read from here, and everything is a stranger's: unknown methods, bits and
group sizes are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ptm.common.errors import CheckpointError, line
from ptm.common.values import show
from ptm.quant.grid import Grid, GridKind
from ptm.quant.pack import Format

KEY = "quantization_config"
TWIN = "quantize_config.json"
METHODS = {
    Format.gptq: "gptq",
    Format.gptq_v2: "gptq",
    Format.compressed_tensors: "compressed-tensors",
    Format.fp6: "ptm-fp6",
}
_INTS = {4: GridKind.int4, 8: GridKind.int8}
_MOST_REGEX = 200


class QuantConfig(NamedTuple):
    """default: of linears that no pattern names; grids: pattern -> grid, None: not quantized."""

    format: Format
    default: Grid
    grids: tuple[tuple[str, Grid | None], ...] = ()
    is_sequential: bool = False
    "Whether it says that no linear's g_idx scatters its inputs."

    def grid_of(self, module: str) -> Grid:
        """Of a quantized linear, whose tensors are there."""
        for pattern, grid in self.grids:
            if grid is not None and re.match(pattern, module):
                return grid
        return self.default


def render(
    format: Format, grids: Mapping[str, Grid | None], *, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys for an export whose linears are on `grids` (None: as they were); `about`: meta."""
    counts: dict[Grid, int] = {}
    for grid in grids.values():
        if grid is not None:
            counts[grid] = counts.get(grid, 0) + 1
    default = max(counts, key=lambda grid: counts[grid])
    others = {name: grid for name, grid in grids.items() if grid not in (default, None)}
    kept = [name for name, grid in grids.items() if grid is None]
    if format is Format.compressed_tensors:
        return _render_ct(default, others, kept)
    if format is Format.fp6:
        kinds = {re.escape(name): str(grid.kind) for name, grid in others.items() if grid}
        return {
            "quant_method": METHODS[format],
            "kind": str(default.kind),
            "group_size": default.group or -1,
            "kinds": kinds,
            "modules_to_not_convert": kept,
            "meta": dict(about),
        }
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in kept}
    for name, grid in others.items():
        assert grid is not None
        dynamic[f"+:^{re.escape(name)}$"] = {"bits": grid.bits, "group_size": grid.group or -1}
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": default.bits,
        "group_size": default.group or -1,
        "desc_act": False,
        "sym": default.is_symmetric,
        "lm_head": False,
        "checkpoint_format": str(format),
        "format": str(format),
        "pack_dtype": "int32",
        "static_groups": True,
        "true_sequential": True,
        "dynamic": dynamic,
        "meta": dict(about),
    }


def _render_ct(default: Grid, others: Mapping[str, Grid | None], kept: list[str]) -> dict[str, Any]:
    def group(grid: Grid, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.is_symmetric,
            "strategy": "group" if grid.group else "channel",
            "group_size": grid.group or None,
            "actorder": None,
            "dynamic": False,
        }
        return {"targets": targets, "weights": weights, "format": "pack-quantized"}

    named: dict[Grid, list[str]] = {}
    for name, grid in others.items():
        assert grid is not None
        named.setdefault(grid, []).append(name)
    groups = [group(grid, names) for grid, names in named.items()]
    groups.append(group(default, ["Linear"]))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
        "ignore": kept,
    }


def parse(keys: Any) -> QuantConfig:
    """Read a quantization_config. Raises CheckpointError naming the key."""
    if not isinstance(keys, dict):
        raise _refuse(KEY, keys, "must be an object")
    method = keys.get("quant_method")
    if method == METHODS[Format.fp6]:
        size = _size(keys.get("group_size"))
        kinds = keys.get("kinds") or {}
        if not isinstance(kinds, dict):
            raise _refuse("kinds", kinds, "must be an object")
        grids = tuple((_pattern(p), Grid(_fp6(k), size)) for p, k in kinds.items())
        return QuantConfig(Format.fp6, Grid(_fp6(keys.get("kind")), size), grids)
    if method == "compressed-tensors":
        return _parse_ct(keys)
    if method != "gptq":
        raise _refuse("quant_method", method, "must be gptq, compressed-tensors or ptm-fp6")
    stored = keys.get("checkpoint_format") or keys.get("format") or "gptq"
    if stored not in (Format.gptq, Format.gptq_v2):
        raise _refuse("checkpoint_format", stored, "must be gptq or gptq_v2")
    is_symmetric = keys.get("sym", True)
    if type(is_symmetric) is not bool:
        raise _refuse("sym", is_symmetric, "must be true or false")
    default = _int_grid(keys.get("bits"), keys.get("group_size"), is_symmetric)
    grids = []
    dynamic = keys.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise _refuse("dynamic", dynamic, "must be an object")
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            grids.append((_pattern(pattern[2:]), None))
        elif not isinstance(changes, dict):
            raise _refuse(f"dynamic.{pattern}", changes, "must be an object")
        else:
            bits, size = (changes.get(k, keys.get(k)) for k in ("bits", "group_size"))
            found = _int_grid(bits, size, changes.get("sym", is_symmetric))
            grids.append((_pattern(pattern.removeprefix("+:")), found))
    desc_act = keys.get("desc_act")
    if desc_act is not None and type(desc_act) is not bool:
        raise _refuse("desc_act", desc_act, "must be true or false")
    return QuantConfig(Format(stored), default, tuple(grids), desc_act is False)


def compare(keys: Mapping[str, Any], twin: Any) -> None:
    """Raise CheckpointError where the file that other readers of GPTQ take says something else."""
    for key in ("bits", "group_size", "sym", "desc_act"):
        there = twin.get(key) if isinstance(twin, dict) else None
        if key in keys and there is not None and there != keys[key]:
            rule = f"{KEY} of config.json has {show(keys[key])}"
            raise CheckpointError(f"{TWIN}: " + line(key, show(there), rule, "make them the same"))


def _parse_ct(keys: dict[str, Any]) -> QuantConfig:
    groups = keys.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refuse("config_groups", groups, "must name a group of weights")
    default, grids = None, []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not isinstance(targets, list):
            raise _refuse(f"config_groups.{name}", group, "must have weights and targets")
        if group.get("input_activations") is not None:
            raise _refuse(f"config_groups.{name}", "input_activations", "must have weights only")
        if weights.get("type", "int") != "int":
            raise _refuse(f"config_groups.{name}.type", weights["type"], "must be int")
        size = weights.get("group_size")
        grid = _int_grid(
            weights.get("num_bits"), -1 if size is None else size, weights.get("symmetric", True)
        )
        for target in targets:
            if target == "Linear":
                default = grid
            else:
                is_regex = str(target).startswith("re:")
                grids.append((_pattern(target[3:]) if is_regex else re.escape(str(target)), grid))
    if default is None:
        default = grids[0][1]
    return QuantConfig(Format.compressed_tensors, default, tuple(grids))


def _int_grid(bits: Any, group: Any, is_symmetric: Any) -> Grid:
    if bits not in _INTS or type(bits) is not int:
        raise _refuse("bits", bits, "must be 4 or 8")
    return Grid(_INTS[bits], _size(group), bool(is_symmetric), torch.float16)


def _size(group: Any) -> int:
    if type(group) is not int or not (group == -1 or 0 < group <= 2**16):
        raise _refuse("group_size", group, "must be -1 or a number of inputs")
    return max(group, 0)


def _fp6(kind: Any) -> GridKind:
    if kind not in (GridKind.fp6_e3m2, GridKind.fp6_e2m3):
        raise _refuse("kind", kind, "must be fp6_e3m2 or fp6_e2m3")
    return GridKind(kind)


def _pattern(pattern: Any) -> str:
    """A stranger's regular expression: short, and without what backtracks for ever."""
    is_plain = isinstance(pattern, str) and len(pattern) <= _MOST_REGEX
    if not is_plain or re.search(r"[+*}][)]?[+*{]|\)[+*{]", pattern):
        raise _refuse("pattern", pattern, "must be a plain regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise _refuse("pattern", pattern, f"is none ({error})") from None
    return pattern


def _refuse(key: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(
        f"config.json {KEY}: " + line(key, value, rule, "get an export that ptm reads")
    )

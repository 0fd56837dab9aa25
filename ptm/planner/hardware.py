"""What one rank may use: measured on this machine, or read from a file that describes another.

    device: cuda             # or cpu
    ranks_per_node: 8        # devices of a machine, or processes that share its RAM
    memory: 80GiB            # of one device, or of the machine when the device is the CPU

On the CPU the memory of a machine is the least of: what the kernel says is available, what the
cgroup (v1 or v2, this one and all above it) still allows, shared between the ranks of the machine;
and RLIMIT_AS, which each process has for itself. What this process already holds counts as there,
because the plan counts it as needed. Not covered: other programs that grow after the plan was made;
swap, which is never planned with.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ptm.common.errors import RecipeError, line
from ptm.common.units import format_bytes, parse_bytes

_USABLE = 0.97
"""Share of a described device's memory that a process gets; the driver keeps the rest."""
_LONGEST_FILE = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Memory of one rank, and how many ranks one machine has."""

    name: str
    device: str
    ranks_per_node: int
    rank_bytes: int
    why: str


def detect(*, local_ranks: int = 1, device: str | None = None) -> Hardware:
    """This machine, shared by `local_ranks` processes; without `device`, cuda where it is there."""
    if device is None:
        device = "cuda" if _cuda_is_there() else "cpu"
    if device == "cuda":
        import torch

        free_bytes, total_bytes = torch.cuda.mem_get_info()
        why = f"free of {format_bytes(total_bytes)} on {torch.cuda.get_device_name()}"
        return Hardware(
            name="this machine",
            device=device,
            ranks_per_node=local_ranks,
            rank_bytes=free_bytes,
            why=why,
        )
    process = psutil.Process().memory_info()
    free = [(psutil.virtual_memory().available, "available RAM"), *cgroup_free()]
    free_bytes, why = min(free)
    rank_bytes = free_bytes // local_ranks + process.rss
    if local_ranks > 1:
        why = f"{format_bytes(free_bytes)} of {why} / {local_ranks} ranks"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit - process.vms + process.rss < rank_bytes:
        # The limit counts mapped memory: what is mapped and not resident is lost to the run.
        rank_bytes = max(0, limit - process.vms + process.rss)
        why = f"RLIMIT_AS of {format_bytes(limit)}"
    return Hardware(
        name="this machine",
        device=device,
        ranks_per_node=local_ranks,
        rank_bytes=rank_bytes,
        why=why,
    )


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, str]]:
    """Bytes each limiting cgroup of this process still allows; its file cache counts as free."""
    for folder, (limit_name, usage_name, cache_name) in _cgroup_folders(root, membership):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if (
            limit is not None and usage is not None and limit < 2**62
        ):  # v1 writes "no limit" as about 2**63
            free_bytes = max(0, limit - usage + _stat(folder / "memory.stat", cache_name))
            yield free_bytes, f"cgroup limit of {format_bytes(limit)}"


def _cgroup_folders(root: Path, membership: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    # Lines are "0::/path" (v2) or "7:memory:/path" (v1). In a container the path may not exist
    # below root: then root itself is the container's group.
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for text in lines:
        _, controllers, path = text.split(":", 2)
        if controllers == "":
            names, top = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "memory"
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder, names
            folder = folder.parent
        yield top, names


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for key, value in (text.split() for text in lines) if key == name), 0)


def load(name: str, *, folders: Sequence[Path] = ()) -> Hardware:
    """The machine a YAML file describes, or NAME.yaml in one of `folders`. Raises RecipeError."""
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        choices = ", ".join(known) or "none"
        raise RecipeError(
            line("hardware", name, "must be a file or a known machine", f"known are: {choices}")
        )
    try:
        with path.open(encoding="utf-8") as file:
            described = yaml.safe_load(file.read(_LONGEST_FILE))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            line("hardware", name, f"must be readable YAML ({reason})", f"mend {path}")
        ) from error
    return _described(path.stem, described)


def _described(name: str, keys: Any) -> Hardware:
    wanted = ("device", "ranks_per_node", "memory")
    if not isinstance(keys, dict) or set(keys) != set(wanted):
        found = ", ".join(map(str, keys)) if isinstance(keys, dict) else type(keys).__name__
        raise RecipeError(
            line("hardware", name, f"must have the keys {', '.join(wanted)}", f"it has: {found}")
        )
    device, ranks = keys["device"], keys["ranks_per_node"]
    if device not in ("cpu", "cuda"):
        raise RecipeError(line("hardware.device", device, "must be cpu or cuda", "change it"))
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= 4096:
        raise RecipeError(line("hardware.ranks_per_node", ranks, "must be 1 to 4096", "change it"))
    memory = parse_bytes(keys["memory"], key="hardware.memory")
    usable = int(memory * _USABLE)
    if device == "cuda":
        why = f"{_USABLE:.0%} of {format_bytes(memory)}"
        return Hardware(name=name, device=device, ranks_per_node=ranks, rank_bytes=usable, why=why)
    why = f"{_USABLE:.0%} of {format_bytes(memory)} / {ranks} ranks"
    return Hardware(
        name=name, device=device, ranks_per_node=ranks, rank_bytes=usable // ranks, why=why
    )

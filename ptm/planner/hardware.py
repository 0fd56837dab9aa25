"""What one rank may use: measured on this machine, or read from a file that describes another.

    device: cuda             # or cpu
    ranks_per_node: 8        # devices of a machine, or processes that share its RAM
    memory: 80GiB            # of one device, or of the machine when the device is the CPU
    host_memory: 2TiB        # of the machine, beside its devices; none is 0
    ssd: 20TiB               # of the machine; none is 0
    speed: {...}             # ptm/planner/speed.py; without it plans have no times

A name stands for NAME.yaml; `16xH200` for 16 ranks on such machines: h200, or h200 with its number
of devices, in capitals or not.

On the CPU the memory of a machine is the least of: what the kernel says is available, what the
cgroup (v1 or v2, this one and all above it) still allows, shared between the ranks of the machine;
and RLIMIT_AS, which each process has for itself. What this process already holds counts as there,
because the plan counts it as needed. Not covered: other programs that grow after the plan was made;
swap, which is never planned with.
"""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ptm.common.errors import RecipeError, line
from ptm.common.units import format_bytes, parse_bytes
from ptm.engine.disk import check_folder
from ptm.planner.speed import Speed, parse_speed

_USABLE = 0.97
"""Share of a described device's memory that a process gets; the driver keeps the rest."""
_LONGEST_FILE = 65_536
_COUNTED = re.compile(r"(\d{1,7})x(.+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Memory and speed of one rank, and how many ranks one machine has."""

    name: str
    device: str
    ranks_per_node: int
    rank_bytes: int
    why: str
    host_bytes: int = 0
    """Memory of the host for one rank; 0 where the device is the CPU, whose memory it is."""
    host_why: str = ""
    ssd_bytes: int = 0
    ssd_why: str = ""
    speed: Speed | None = None
    speed_why: str = ""


def detect(
    *, local_ranks: int = 1, device: str | None = None, ssd_path: Path | None = None
) -> Hardware:
    """This machine, shared by `local_ranks` processes; without `device`, cuda where it is there.

    Its speed is not known yet: ptm/planner/probe.py measures it.
    """
    ssd_bytes = _free_on(ssd_path) // local_ranks if ssd_path is not None else 0
    ssd_why = f"free on the disk of {ssd_path}, for one of {local_ranks} ranks"
    if device is None:
        device = "cuda" if _cuda_is_there() else "cpu"
    if device == "cuda":
        import torch

        free_bytes, total_bytes = torch.cuda.mem_get_info()
        why = f"free of {format_bytes(total_bytes)} on {torch.cuda.get_device_name()}"
        host_bytes, host_why = _host(local_ranks)
        return Hardware(
            name="this machine",
            device=device,
            ranks_per_node=local_ranks,
            rank_bytes=free_bytes,
            why=why,
            host_bytes=host_bytes,
            host_why=host_why,
            ssd_bytes=ssd_bytes,
            ssd_why=ssd_why,
        )
    process = psutil.Process().memory_info()
    rank_bytes, why = _host(local_ranks)
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
        ssd_bytes=ssd_bytes,
        ssd_why=ssd_why,
    )


def _host(local_ranks: int) -> tuple[int, str]:
    """Memory of this machine for one rank, what this process holds included."""
    free = [(psutil.virtual_memory().available, "available RAM"), *cgroup_free()]
    free_bytes, why = min(free)
    if local_ranks > 1:
        why = f"{format_bytes(free_bytes)} of {why} / {local_ranks} ranks"
    return free_bytes // local_ranks + psutil.Process().memory_info().rss, why


def _free_on(ssd_path: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet. Raises StorageError where there
    is no disk to write to."""
    return shutil.disk_usage(check_folder(ssd_path)).free


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


def counted(name: str) -> tuple[int | None, str]:
    """`16xH200` as 16 and H200; a name without a number as it is."""
    matched = _COUNTED.fullmatch(name)
    return (int(matched[1]), matched[2]) if matched else (None, name)


def load(name: str, *, folders: Sequence[Path] = ()) -> Hardware:
    """The machine a YAML file describes, or NAME.yaml in one of `folders`. Raises RecipeError."""
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    path = _find(name, known)
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


def _find(name: str, known: dict[str, Path]) -> Path:
    wanted = counted(name)[1].lower() if counted(name)[0] else name
    for stem, path in known.items():
        if wanted in (stem, re.sub(r"-\d+$", "", stem)):
            return path
    return Path(name)


def _described(name: str, keys: Any) -> Hardware:
    wanted = ("device", "ranks_per_node", "memory")
    known = {*wanted, "host_memory", "ssd", "speed"}
    if not isinstance(keys, dict) or set(wanted) - set(keys) or set(keys) - known:
        found = ", ".join(map(str, keys)) if isinstance(keys, dict) else type(keys).__name__
        rule = f"must have the keys {', '.join(wanted)}, and may have host_memory, ssd, speed"
        raise RecipeError(line("hardware", name, rule, f"it has: {found}"))
    device, ranks = keys["device"], keys["ranks_per_node"]
    if device not in ("cpu", "cuda"):
        raise RecipeError(line("hardware.device", device, "must be cpu or cuda", "change it"))
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= 4096:
        raise RecipeError(line("hardware.ranks_per_node", ranks, "must be 1 to 4096", "change it"))

    def share(key: str) -> tuple[int, str]:
        """One rank's share of a thing of the machine."""
        whole = parse_bytes(keys.get(key, 0), key=f"hardware.{key}")
        return int(whole * _USABLE) // ranks, f"{_USABLE:.0%} of {format_bytes(whole)} / {ranks}"

    memory = parse_bytes(keys["memory"], key="hardware.memory")
    rank_bytes, why = int(memory * _USABLE), f"{_USABLE:.0%} of {format_bytes(memory)}"
    if device == "cpu":
        rank_bytes, why = share("memory")
    host_bytes, host_why = share("host_memory")
    ssd_bytes, ssd_why = share("ssd")
    return Hardware(
        name=name,
        device=device,
        ranks_per_node=ranks,
        rank_bytes=rank_bytes,
        why=why,
        host_bytes=host_bytes if device == "cuda" else 0,
        host_why=host_why,
        ssd_bytes=ssd_bytes,
        ssd_why=ssd_why,
        speed=parse_speed(keys["speed"]) if "speed" in keys else None,
        speed_why=f"rates of {name}.yaml",
    )

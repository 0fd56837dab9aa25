"""The only reader of os.environ: who this process is, and the few PTM_* switches.

Ranks come from torchrun's variables, or Slurm's where torchrun is absent; a plain process is a
world of one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Ranks(NamedTuple):
    """This process among its peers."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def ranks() -> Ranks:
    if "RANK" in os.environ:
        return Ranks(*(int(os.environ.get(k, d)) for k, d in _TORCHRUN))
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return Ranks(*(int(os.environ.get(k, d)) for k, d in _SLURM))
    return Ranks(0, 1, 0, 1)


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
_SLURM = (
    ("SLURM_PROCID", "0"),
    ("SLURM_NTASKS", "1"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NTASKS_PER_NODE", "1"),
)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def folder_of_ranks() -> Path | None:
    """A private folder of this start of the job, made by torchrun's agent for this node's ranks."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[1] if error_file else None


def torch_log_level() -> str | None:
    """The level of torchrun's own log, if the user wants to see it."""
    return os.environ.get("LOGLEVEL")


def cache_dir() -> Path:
    """Where prepared data lives when the recipe does not say: PTM_CACHE, else the user's cache
    folder."""
    if "PTM_CACHE" in os.environ:
        return Path(os.environ["PTM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptm"


def wandb_mode() -> str | None:
    return os.environ.get("WANDB_MODE")


def wandb_logged_in() -> bool:
    """Whether wandb has a key without asking for one: in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")


def kernel_backend() -> str:
    """PTM_BACKEND: auto (the fastest that is built and runs here) or reference (torch alone)."""
    return os.environ.get("PTM_BACKEND") or "auto"


def cpu_isa() -> str | None:
    """PTM_CPU_ISA: the instruction set of the CPU kernels, where it is not the machine's best."""
    return os.environ.get("PTM_CPU_ISA") or None


def cuda_kernels() -> str:
    """PTM_CUDA_KERNELS: 1 lets the kernels of csrc/ serve tensors on CUDA devices; 0 by default,
    for they have not been run on one yet."""
    return os.environ.get("PTM_CUDA_KERNELS") or "0"


def collectives() -> str:
    """PTM_COLLECTIVES: memory, which CPU ranks of one machine share, or gloo, its sockets."""
    return os.environ.get("PTM_COLLECTIVES") or "memory"


def set_default(name: str, value: str) -> None:
    """Set a variable for libraries started later, unless the user has set it."""
    os.environ.setdefault(name, value)


def child(**changes: str) -> dict[str, str]:
    """This environment with changes, for a process to start."""
    return {**os.environ, **changes}


def recorded() -> dict[str, str]:
    """What may be written into a run folder: an allow-list, so no secret is ever among them."""
    names = (
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "WORLD_SIZE",
    )
    return {
        k: v
        for k, v in os.environ.items()
        if k in names or (k.startswith("PTM_") and "KEY" not in k)
    }

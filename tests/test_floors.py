"""Who may import whom, and the narrow doors, kept as data and checked on the syntax of every file.

Import only from lower floors; neighbours are strangers. Imports inside functions and for type
checkers count too. Each rule is also shown a file that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    {"common"},
    {"kernels", "mesh"},
    {"model", "engine", "optim", "data", "quant"},
    {"parallel", "planner", "checkpoint"},
    {"trainer", "eval", "serve", "export", "report"},
    {"recipe"},
    {"wiring"},
    {"launch"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}

# Files directly in ptm/, and packages, that are parts of one room.
ROOMS = {
    "recipe": {"recipe", "recipe_files", "jobs", "run_folder"},
    "wiring": {
        "build",
        "inputs",
        "modes",
        "parts",
        "policies",
        "tuning",
        "verbs",
        "verbs_data",
        "verbs_export",
        "bench",
        "cli",
        "__init__",
        "__main__",
    },  # fmt: skip
}
ROOM_OF = {name: room for room, names in ROOMS.items() for name in names}

# A door: what may be named only there. `torch.distributed` is the collectives themselves; of the
# modules below it, the pickle-free checkpoint and the tensors that know their shard have own doors.
DOORS = {
    "os.environ": ("ptm/common/env.py",),
    "os.getenv": ("ptm/common/env.py",),
    "torch.distributed": ("ptm/mesh/", "ptm/checkpoint/save.py", "ptm/checkpoint/load.py"),
    "torch.distributed.device_mesh": ("ptm/mesh/", "ptm/engine/"),
    "torch.distributed.tensor": ("ptm/engine/", "ptm/parallel/", "ptm/checkpoint/"),
    "torch.distributed.checkpoint": ("ptm/checkpoint/",),
    "torch.distributed.fsdp": ("ptm/engine/shard.py", "ptm/parallel/"),
    "torch.utils.cpp_extension": ("ptm/kernels/",),
    "safetensors": ("ptm/checkpoint/", "ptm/export/"),
    "pyarrow": ("ptm/data/",),
}
NOWHERE = {
    "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib",
    "torch.load", "torch.save", "torch.hub", "numpy.load", "eval", "exec", "__import__",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader",
    "os.system", "os.popen", "subprocess.getoutput", "tarfile", "zipfile",
}  # fmt: skip
ARGUMENTS_NOWHERE = {("shell", True), ("weights_only", False), ("allow_pickle", True),
                     ("trust_remote_code", True)}  # fmt: skip

FILES = sorted(p for d in ("ptm", "launch") for p in (ROOT / d).rglob("*.py"))


def names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported or read, with `import x as y` undone."""
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                alias[a.asname or a.name.partition(".")[0]] = (
                    a.name if a.asname else a.name.partition(".")[0]
                )
                yield a.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "write imports in full"
            for a in node.names:
                alias[a.asname or a.name] = f"{node.module}.{a.name}"
                yield f"{node.module}.{a.name}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load):
            parts = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([alias.get(inner.id, inner.id), *reversed(parts)])


def room(parts: tuple[str, ...]) -> str:
    """The package of a path below ptm/, or the room of a file directly in it."""
    name = parts[0].removesuffix(".py")
    return ROOM_OF.get(name, name)


def wrong_imports(source: str, path: str) -> list[str]:
    top, *rest = Path(path).parts
    here = "launch" if top == "launch" else room(tuple(rest))
    if here not in FLOOR:
        return [f"{path}: {here} has no floor; give it one in FLOORS"]
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{a.name}" for a in node.names]
        for module in modules:
            if not module.startswith("ptm."):
                continue
            there = room(tuple(module.split(".")[1:]))
            if module == "ptm.__version__" or there == here:
                continue
            if FLOOR.get(there, 99) >= FLOOR[here]:
                found.append(f"{path}:{node.lineno} {here} imports {module}")  # type: ignore[attr-defined]
    return found


def wrong_names(source: str, path: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for name in set(names(tree)):
        parts = name.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        found += [f"{path}: {p} is nowhere allowed" for p in prefixes if p in NOWHERE]
        doors = [p for p in prefixes if p in DOORS]
        if doors and not path.startswith(DOORS[doors[-1]]):  # the longest door decides
            found.append(f"{path}: {name} only in {', '.join(DOORS[doors[-1]])}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            for argument, value in ARGUMENTS_NOWHERE:
                if node.arg == argument and node.value.value is value:
                    found.append(f"{path}:{node.value.lineno} {argument}={value}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_and_names_stay_behind_their_doors(path: Path) -> None:
    source, name = path.read_text(), path.relative_to(ROOT).as_posix()
    assert wrong_imports(source, name) + wrong_names(source, name) == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("ptm/model/x.py", "from ptm.engine.page import Page"),
        ("ptm/model/x.py", "import ptm.data.pack"),
        ("ptm/common/x.py", "from ptm.model.config import ModelConfig"),
        ("ptm/common/x.py", "def f():\n    from ptm import recipe"),
        ("ptm/trainer/x.py", "from ptm.eval.perplexity import held_out"),
        ("ptm/trainer/x.py", "from ptm.recipe import Recipe"),
        ("ptm/recipe.py", "from ptm.build import train"),
        ("ptm/run_folder.py", "from ptm.cli import main"),
        ("ptm/other/x.py", "import os"),
        ("ptm/checkpoint/x.py", "if TYPE_CHECKING:\n    from ptm.planner.cost import Cost"),
    ],
)
def test_an_import_that_goes_up_or_aside_is_seen(path: str, source: str) -> None:
    assert wrong_imports(source, path)


@pytest.mark.parametrize(
    "path, source",
    [
        ("ptm/model/x.py", "import os\nos.environ['A']"),
        ("ptm/model/x.py", "from os import environ"),
        ("ptm/model/x.py", "from os import environ as e"),
        ("ptm/model/x.py", "import os as o\no.getenv('A')"),
        ("ptm/engine/x.py", "import torch.distributed as dist"),
        ("ptm/engine/x.py", "from torch import distributed"),
        ("ptm/engine/x.py", "import torch\ntorch.distributed.all_reduce(x)"),
        ("ptm/trainer/x.py", "from torch.distributed.tensor import DTensor"),
        ("ptm/engine/x.py", "from torch.distributed.checkpoint import save"),
        ("ptm/engine/x.py", "from torch.distributed.fsdp import fully_shard"),
        ("ptm/data/x.py", "import pickle"),
        ("ptm/data/x.py", "import torch as t\nt.load('x')"),
        ("ptm/data/x.py", "from torch import load"),
        ("ptm/data/x.py", "import numpy as np\nnp.load('x')"),
        ("ptm/data/x.py", "eval('1')"),
        ("ptm/data/x.py", "import yaml\nyaml.load('1', Loader=yaml.SafeLoader)"),
        ("ptm/data/x.py", "import subprocess\nsubprocess.run('x', shell=True)"),
        ("ptm/data/x.py", "f(weights_only=False)"),
        ("launch/x.py", "import os\nos.system('x')"),
        ("ptm/model/x.py", "from safetensors import safe_open"),
    ],
)
def test_a_name_outside_of_its_door_is_seen(path: str, source: str) -> None:
    assert wrong_names(source, path)


@pytest.mark.parametrize(
    "path, source",
    [
        ("ptm/model/x.py", "model.eval()\nimport json\njson.load(f)\nstate.load('x')"),
        ("ptm/common/env.py", "import os\nos.environ"),
        ("ptm/engine/x.py", "from torch.distributed.tensor import DTensor"),
        ("ptm/mesh/x.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("ptm/checkpoint/x.py", "from torch.distributed.checkpoint.hf_storage import A"),
        ("ptm/build.py", "import ptm\nfrom ptm.common import env\nfrom ptm.recipe import Recipe"),
    ],
)
def test_what_is_allowed_is_not_seen(path: str, source: str) -> None:
    assert wrong_imports(source, path) + wrong_names(source, path) == []


def test_every_package_is_shipped() -> None:
    declared = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ptm").rglob("*.py")}
    assert set(re.findall(r'"(.+)"', declared)) == found | {"ptm.recipes"}

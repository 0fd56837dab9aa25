"""ptm trains mixture-of-experts language models and takes them to cheap inference.

    recipe = ptm.load_recipe(["recipe=m32", "model.scale=mini"])
    model = ptm.load_model("runs/m32-mini")

Importing ptm imports nothing else: torchrun's agent and the command line load it on every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptm.checkpoint.load_model import load_model
    from ptm.recipe import load_recipe

__all__ = ["__version__", "load_model", "load_recipe"]
__version__ = "0.1.0"

_HOMES = {"load_recipe": "ptm.recipe", "load_model": "ptm.checkpoint.load_model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ptm' has no attribute {name!r}")

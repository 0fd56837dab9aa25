"""How a library that hooks a module's call is made to see methods of the model that are called from
outside: `loss` is run as the model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

ENTRIES = ("loss", "log_probs", "next_logits", "hidden", "run")
"""Methods of the model, besides `forward`, that are called from outside: all that use the head's
weight, which is whole only within a call."""


def enter_as_one(model: nn.Module, call: Callable[..., Any]) -> None:
    """Send ENTRIES through `call(method, *args)`, which is to end in `model(method, *args)`.

    Calls inside of one, as `loss` makes to `hidden`, are plain: entered twice, a unit would be
    hooked twice.
    """
    forward = model.forward
    is_inside = False

    def outermost(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        function, rest = (args[0], args[1:]) if args and callable(args[0]) else (forward, args)
        is_inside = True
        try:
            return function(*rest, **kwargs)
        finally:
            is_inside = False

    def entry(method: Callable[..., Any]) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) if is_inside else call(method, *args, **kwargs)

        return enter

    model.forward = outermost
    for name in ENTRIES:
        if hasattr(model, name):
            setattr(model, name, entry(getattr(model, name)))

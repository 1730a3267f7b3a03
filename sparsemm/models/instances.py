"""Attributes set on single module instances, and taken off again without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


def forward_name(module: nn.Module) -> str:
    """The attribute that holds the real forward of `module`.

    accelerate keeps it in `_old_forward` and calls it from the forward it set: what stands in for it goes inside, so
    that the hooks (moving weights and inputs between devices) keep working, once a call.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def set_on_instance(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set `owner.name` on the instance; the returned function puts back what was there, or that nothing was."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)

    def undo() -> None:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo

"""Single module instances: attributes set and taken off again without a trace, and what was found out about them."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from sparsemm.errors import PatchError

T = TypeVar("T")

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


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes: what accelerate's hooks say, else where it is; meta where no hook brings its weights."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


class Replacement:
    """What stands in for a method of one module instance while a patch lasts.

    Attributes:
        original: The method, to call and to look at.
    """

    def __init__(self, original: Callable[..., Any], function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # transformers and accelerate read the names of parameters
        self.original, self._function = original, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError("a patched model cannot be copied or pickled; remove the patch first")


def as_built(module: nn.Module) -> bool:
    """Whether nothing but this package's patch, and transformers' division of weights among processes, stands between a
    call of `module` and its class's forward."""
    forward = vars(module).get("forward")
    while isinstance(forward, Replacement):
        forward = forward.original
    own = forward is None or getattr(forward, "__func__", None) is type(module).forward or _divides(forward)
    return own and not (module._forward_hooks or module._forward_pre_hooks or "_old_forward" in vars(module))


def _divides(forward: Any) -> bool:
    """Whether `forward` is what transformers sets on a module of a tensor-parallel plan."""
    return getattr(forward, "__name__", "") == "tp_forward" and forward.__module__.startswith("transformers.")


class Findings(Generic[T]):
    """What was found out about models, each remembered while forwards, weights and settings stay as they were then.

    What a `Replacement` stands in for counts, not what it does. Weights changed behind autograd's back, by way of
    `.data`, are not noticed.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[list[_Trait], T]] = weakref.WeakKeyDictionary()

    def about(self, model: nn.Module, parts: Iterable[nn.Module], find: Callable[[], T]) -> T:
        """What `find` found about `model` when `parts` were last as they are now; otherwise it is asked again.

        What it raises is not remembered. The finding must hold no reference to the model.
        """
        traits = [trait for part in parts for trait in _traits(part)]
        known, finding = self._known.get(model, ([], None))
        if len(known) != len(traits) or not all(map(_same, known, traits)):
            finding = find()
            self._known[model] = ([_weakly(trait) for trait in traits], finding)
        return finding


_Trait = tuple[Any, Any]


def _traits(module: nn.Module) -> Iterator[_Trait]:
    """Forward, hooks, weights and plain settings of a module and its parts, each with what changes in place."""
    for part in module.modules():
        forward = getattr(part, forward_name(part))
        while isinstance(forward, Replacement):
            forward = forward.original
        yield getattr(forward, "__func__", forward), None
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor, None if tensor.is_inference() else tensor._version
        settings = {
            name: value for name, value in vars(part).items() if isinstance(value, (str, int, float, type(None)))
        }
        hooks = (*part._forward_pre_hooks, *part._forward_hooks)  # numbers that are given once
        yield None, {**settings, "training": None, "_forward_hooks": hooks}


def _weakly(trait: _Trait) -> _Trait:
    return None if trait[0] is None else weakref.ref(trait[0]), trait[1]


def _same(known: _Trait, now: _Trait) -> bool:
    return (None if known[0] is None else known[0]()) is now[0] and known[1] == now[1]

"""Peak memory without a GPU: the bytes of all tensors that are alive at once, exact down to what operators return."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Alive(TorchDispatchMode):
    """Follows every storage that operators return until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(result.alias_info for result in func._schema.returns):
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor):
                    self._follow(each.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, freed)
        self.now += size


def peak_new_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors made during `run` held at once. Scratch memory inside a kernel is not seen."""
    alive = _Alive()
    with alive:
        run()
    return alive.peak

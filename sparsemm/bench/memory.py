"""Bytes: of weights and cache rows, of all tensors alive at once (exact down to what operators return), and how fast
they are copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemm.bench.cells import take_turns
from sparsemm.bench.shapes import attention_shape
from sparsemm.models import family_of
from sparsemm.models.parallel import own


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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in this process, shared ones once."""
    tensors = map(own, [*model.parameters(), *model.buffers()])
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def step_weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step has to read, in this process: decoder layers, norm and output matrix, not
    the embedding."""
    text_model, head = family_of(model).text_model(model), model.get_output_embeddings()
    parts = (text_model.layers, text_model.norm, head)
    return sum(own(parameter).nbytes for part in parts for parameter in part.parameters())


def row_bytes(model: nn.Module) -> int:
    """Bytes of the key and value rows of one token in all layers."""
    shape = attention_shape(model.config)
    return 2 * shape.head_dim * shape.kv_heads * shape.layers * model.dtype.itemsize


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second of a large copy, read and write both counted; the best of ten."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * size / min(seconds)

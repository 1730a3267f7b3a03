"""Bytes that the processes of a divided model hand each other for one token: by formula, and as seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemm.models import family_of


def step_bytes(model: nn.Module, batch: int, size: int) -> int:
    """Bytes that one process hands to the collectives of a decode step, by the plans of transformers.

    Two all-reduces a layer (behind `o_proj` and `down_proj`) and one more where the embedding is divided by tokens,
    each of `[batch, hidden_size]`; the gather of this process's part of the logits, `[batch, vocab_size / size]`, as
    many in each process (rounded up).
    """
    text = family_of(model).text_model(model)
    divided = hasattr(text.embed_tokens.weight, "to_local")
    reduces = 2 * len(text.layers) + int(divided)
    head = model.get_output_embeddings()
    gathered = -(-head.weight.shape[0] // size) if hasattr(head.weight, "to_local") else 0
    return batch * (reduces * text.config.hidden_size + gathered) * model.dtype.itemsize


def sent_bytes(run: Callable[[], Any]) -> int:
    """Bytes that this process hands to collectives during `run`."""
    seen = _Collectives()
    with seen:
        run()
    return seen.bytes


class _Collectives(TorchDispatchMode):
    """Adds up what collectives are handed: those of torch.distributed, and the functional ones of DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # it is taken apart first, and what it does then is seen
        name = func._schema.name
        if name in ("c10d::allreduce_", "_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor"):
            self._add(args[0])
        elif name in ("c10d::allgather_", "c10d::_allgather_base_"):
            self._add(args[1])
        return func(*args, **(kwargs or {}))

    def _add(self, tensors: Any) -> None:
        for each in tensors if isinstance(tensors, (list, tuple)) else (tensors,):
            self.bytes += each.nbytes if isinstance(each, torch.Tensor) else 0

"""Projections of one input laid side by side in memory, so that one product computes them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparsemm.models.instances import as_built

_TOGETHER = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def merge_projections(layer: nn.Module) -> list[Callable[[], None]]:
    """Let the weights of a decoder layer's projections be views of one tensor, for those of one input.

    No second copy stays: the largest addition at any time is one group's weights. What is no plain linear layer
    (quantised, divided, offloaded, wrapped by an adapter, hooked) is left alone. Returns what undoes it.
    """
    undo = []
    for owner, names in _TOGETHER:
        parts = [getattr(getattr(layer, owner, None), name, None) for name in names]
        if all(map(is_plain, parts)) and len({_kind(part) for part in parts}) == 1:
            undo += [_merge([part.weight for part in parts])]
            if parts[0].bias is not None:
                undo += [_merge([part.bias for part in parts])]
    return undo


def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor that all of them are consecutive parts of, along their first dimension; None where they are not."""
    if len(tensors) < 2 or any(each is None or not each.is_contiguous() for each in tensors):
        return None
    first = tensors[0]
    begin, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for each in tensors:
        if each.data_ptr() != begin or each.untyped_storage().data_ptr() != storage or each.dtype != first.dtype:
            return None
        begin += each.nbytes
    rows = sum(each.shape[0] for each in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _merge(tensors: list[Tensor]) -> Callable[[], None]:
    whole = torch.cat([each.data for each in tensors])
    for each, part in zip(tensors, whole.split([each.shape[0] for each in tensors]), strict=True):
        each.data = part

    def undo() -> None:
        for each in tensors:
            each.data = each.data.clone()

    return undo


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer and nothing else: not quantised, divided, offloaded, wrapped or hooked."""
    return (
        type(module) is nn.Linear
        and as_built(module)
        and type(module.weight) is nn.Parameter
        and not module.weight.is_meta
    )


def _kind(module: nn.Linear) -> tuple[object, ...]:
    return module.in_features, module.weight.dtype, module.weight.device, module.bias is None

"""Whether a fused operator rotates queries and keys as a model does, found out by trying both."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsemm.models.projections import Projections
from sparsemm.ops.backends import operators


def nearly_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding alone: a fraction of the last place of 16-bit numbers on average, some of
    them of float32, where sums are taken in another order."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    eps = torch.finfo(expected.dtype).eps
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(difference <= (64 if eps < 1e-5 else 0.5) * eps * size)


def with_rotation(
    projections: Projections, position_embeddings: tuple[Tensor, Tensor] | None, states: dict[str, Tensor]
) -> Projections:
    """The same projections, saying how `rope_append` rotates as they do, if it does.

    states: "query" and "key" `[1, heads, columns, head_dim]`, any numbers. Of cos and sin the shape counts.
    """
    if projections.rotary is None:
        return projections
    query, key, numbers = states["query"], states["key"], torch.Generator().manual_seed(0)
    cos, sin = (torch.rand(each.shape, generator=numbers).to(query) for each in position_embeddings)
    _, num_kv_heads, columns, head_dim = key.shape
    offsets = torch.arange(num_kv_heads + 1, dtype=torch.int32, device=key.device) * columns
    expected = projections.rotary(query, key, cos, sin)
    rotate = operators(key.device, key.dtype, head_dim).rope_append
    for interleaved in (False, True):
        lens, rows = torch.zeros_like(offsets[1:]), key.new_zeros(num_kv_heads * columns, head_dim)
        buffers = (offsets, lens, rows, torch.zeros_like(rows), torch.zeros_like(offsets[:1]))
        try:
            found = rotate(query, key, key, cos, sin, *buffers, interleaved=interleaved), rows.view(key.shape)
        except RuntimeError:  # sizes that the kernels refuse, or factors that are not those of one row a column
            break
        if all(map(nearly_equal, found, expected)):
            return dataclasses.replace(projections, interleaved=interleaved)
    return projections

"""Long chunks over a ragged cache: dense causal attention inside the chunk, merged with the kept rows by
log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.ops.reference import softmax_and_lse

MAX_DECODE_QUERIES = 16
"""Up to this many new columns go through `varlen_decode` as they are; more are split into kept rows and chunk."""

_QUERY_TILE = 256  # queries whose float32 logits exist at a time


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention among the n columns of a chunk, grouped queries, softmax in float32.

    query `[B, Hq, n, D]`, key and value `[B, Hkv, n, D]`, mask bool `[B, n]` (True = attend to the column). Returns
    out `[B, Hq, n, D]` in the dtype of query and lse float32 `[B, Hq, n]`; a query that sees nothing gives 0 and -inf.
    """
    batch, num_query_heads, n, head_dim = query.shape
    grouped = query.view(batch, key.shape[1], -1, n, head_dim).float()
    key, value = key.float()[:, :, None], value.float()[:, :, None]
    column = torch.arange(n, device=query.device)
    out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1])
    for begin in range(0, n, _QUERY_TILE):
        tile = slice(begin, min(begin + _QUERY_TILE, n))
        visible = column[: tile.stop] <= column[tile, None]
        if mask is not None:
            visible = visible & mask[:, None, None, None, : tile.stop]
        logits = grouped[..., tile, :] @ key[..., : tile.stop, :].transpose(-1, -2) * scale
        logits = logits.masked_fill(~visible, float("-inf"))
        weights, lse[..., tile] = softmax_and_lse(logits)
        out[..., tile, :] = weights @ value[..., : tile.stop, :]
    return out.view_as(query).to(query.dtype), lse.view(batch, num_query_heads, n)


def merge_attention(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of two disjoint sets of rows from (out, lse) over each: `[B, Hq, n, D]`."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    weights, _ = softmax_and_lse(torch.stack([lse_a, lse_b], dim=-1))
    return (out_a.float() * weights[..., :1] + out_b.float() * weights[..., 1:]).to(out_a.dtype)

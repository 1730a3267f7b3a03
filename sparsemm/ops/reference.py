"""PyTorch twins of the operators in `schemas.py`: the path of every device without a compiled kernel, and the tests'
reference.

They follow the schemas to the letter and favour the plain formulation. None copies rows that are already cached. On a
GPU `append` and `varlen_decode` read indices on the host (one synchronisation each); the compiled kernels do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.ops import checks


def _list_of_item(cu_lengths: Tensor, total: int) -> Tensor:
    """The row list that item 0 .. total - 1 belongs to, from the running sums `[R + 1]`: int64 `[total]`."""
    items = torch.arange(total, device=cu_lengths.device, dtype=cu_lengths.dtype)
    return torch.searchsorted(cu_lengths[1:].contiguous(), items, right=True)


def softmax_and_lse(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; where every logit is -inf, 0 and -inf."""
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]), lse


def compact(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cu_kept: Tensor,
    offsets: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
) -> None:
    checks.check_compact(key, value, positions, cu_kept, offsets, key_buffer, value_buffer)
    total, num_kv_heads = positions.shape[0], key.shape[1]
    row_list = _list_of_item(cu_kept, total)
    slot = torch.arange(total, device=key.device) + (offsets[:-1] - cu_kept[:-1]).long()[row_list]
    source = (row_list // num_kv_heads, row_list % num_kv_heads, positions.long())
    key_buffer[slot] = key[source]
    value_buffer[slot] = value[source]


def append(
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    lens: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
    overflow: Tensor,
    mask: Tensor | None = None,
) -> None:
    checks.check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask)
    batch, num_kv_heads, n, _ = key.shape
    if mask is None:
        mask = torch.ones(batch, n, dtype=torch.bool, device=key.device)
    num_new = mask.sum(1).repeat_interleave(num_kv_heads)
    fits = lens + num_new <= offsets.diff()
    overflow.masked_fill_(~fits.all(), 1)
    stored = fits.view(batch, num_kv_heads, 1) & mask[:, None]
    rank = mask.long().cumsum(1) - 1  # place of each stored column among the new rows of its list
    slot = (offsets[:-1] + lens).view(batch, num_kv_heads, 1) + rank[:, None]
    key_buffer[slot[stored]] = key[stored]
    value_buffer[slot[stored]] = value[stored]
    lens.add_(torch.where(fits, num_new, 0).to(lens.dtype))


def varlen_decode(
    query: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
    offsets: Tensor,
    lens: Tensor,
    scale: float,
    num_later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checks.check_varlen_decode(query, key_buffer, value_buffer, offsets, lens, num_later)
    batch, num_query_heads, n, head_dim = query.shape
    num_kv_heads = lens.shape[0] // batch
    group = num_query_heads // num_kv_heads
    # Tiny or double inputs keep their own precision; 16-bit rows are read as float32.
    compute = query.dtype if query.dtype == torch.float64 else torch.float32
    if num_later is None:
        num_later = torch.arange(n - 1, -1, -1, device=query.device, dtype=torch.int32).expand(batch, n)
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, num_query_heads, n, dtype=torch.float32)
    begins, lengths = offsets.tolist(), lens.tolist()
    every_row_seen = not bool(num_later.any())
    for r in range(batch * num_kv_heads):
        b, heads = r // num_kv_heads, slice(r % num_kv_heads * group, (r % num_kv_heads + 1) * group)
        rows = slice(begins[r], begins[r] + lengths[r])
        logits = query[b, heads].to(compute) @ key_buffer[rows].to(compute).T * scale  # [group, n, rows]
        if not every_row_seen:
            seen = torch.arange(lengths[r], device=query.device) < (lengths[r] - num_later[b])[:, None]
            logits = logits.masked_fill(~seen, float("-inf"))
        weights, total = softmax_and_lse(logits)
        out[b, heads] = (weights @ value_buffer[rows].to(compute)).to(query.dtype)
        lse[b, heads] = total.float()
    return out, lse


def window_scores(query: Tensor, key: Tensor, starts: Tensor, num_queries: Tensor, scale: float) -> Tensor:
    checks.check_window_scores(query, key, starts, num_queries)
    batch, num_query_heads, window, _ = query.shape
    num_kv_heads, num_columns = key.shape[1:3]
    column = torch.arange(num_columns, device=key.device)
    query_index = torch.arange(window, device=key.device)
    causal = column <= (num_columns - window + query_index)[:, None]  # [w, T]
    counted = query_index >= window - num_queries[:, None]  # [B, w]
    grouped = query.view(batch, num_kv_heads, -1, window, query.shape[-1])
    scores = key.new_empty(batch, num_kv_heads, num_columns, dtype=torch.float32)
    for b in range(batch):  # one batch row at a time bounds the float32 logits to [Hq, w, T]
        visible = causal & (column >= starts[b, :, None])[:, None, None]  # [Hkv, 1, w, T]
        logits = torch.einsum("hgwd,htd->hgwt", grouped[b].float(), key[b].float()) * scale
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        # Queries that do not count may see no column at all (NaN rows), so they are dropped, not weighted by zero.
        weights = torch.where(counted[b, :, None], weights, 0.0)
        scores[b] = weights.sum(2).mean(1) / num_queries[b].clamp(min=1)
    return scores


def select_rows(scores: Tensor, starts: Tensor, counts: Tensor, window: int, cu_kept: Tensor, total: int) -> Tensor:
    checks.check_select_rows(scores, starts, counts, window, cu_kept, total)
    num_lists, num_columns = scores.shape
    device = scores.device
    column = torch.arange(num_columns + window, device=device)
    in_range = column[:num_columns] >= starts[:, None]
    order = scores.masked_fill(~in_range, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, column[:num_columns].expand(num_lists, -1))
    kept = torch.cat([rank < counts[:, None], column[num_columns:] >= starts[:, None]], dim=1)
    # A kept column's place in its list is the number of kept columns before it; the rest is written to a spare last
    # item.
    place = torch.where(kept, cu_kept[:-1, None] + kept.cumsum(1) - 1, total)
    positions = torch.empty(total + 1, dtype=torch.int32, device=device)
    positions.scatter_(0, place.reshape(-1), column.int().expand(num_lists, -1).reshape(-1))
    return positions[:total]


def _normed(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """RMS norm over the last dimension: float32 inside, rounded as the modules of transformers round."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.float())).to(x.dtype) if unit_offset else weight * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_add_rms_norm(x, residual, weight)
    total = x if residual is None else x + residual
    return _normed(total, weight, eps, unit_offset), x.new_empty((0,)) if residual is None else total


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`[B, heads, n, D]` rotated by cos and sin `[B or 1, n, R]`; see `rope_append`."""
    width = cos.shape[-1]
    turned, rest = states[..., :width], states[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        cos, sin = (each[..., : width // 2].repeat_interleave(2, dim=-1) for each in (cos, sin))
        other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    else:
        other = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    return torch.cat([turned * cos + other * sin, rest], dim=-1)


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor,
    lens: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
    overflow: Tensor,
    mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    interleaved: bool = False,
) -> Tensor:
    checks.check_rope_append(
        query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask, query_weight, key_weight
    )
    if query_weight is not None:
        query = _normed(query, query_weight, eps, unit_offset)
        key = _normed(key, key_weight, eps, unit_offset)
    append(
        _rotated(key, cos, sin, interleaved), value, offsets, lens, key_buffer, value_buffer, overflow, mask
    )  # fmt: skip
    return _rotated(query, cos, sin, interleaved).contiguous()


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    checks.check_gated(gate, up)
    return (torch.nn.functional.silu(gate) * up).contiguous()


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    checks.check_gated(gate, up)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).contiguous()

"""What a head's output loses with fewer rows: distortion as a function of the rows kept (spec section 10)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

STEPS_PER_OCTAVE = 4
"""Points of a curve between r and 2r rows."""


def row_grid(window: int, length: int) -> list[int]:
    """Numbers of rows from `window` upwards in geometric steps; the last is the first one not below `length`.

    The points do not depend on `length`: curves of pages of any length meet on them.
    """
    rows = [window]
    for step in itertools.count(1):
        if rows[-1] >= length:
            return rows
        point = round(window * 2 ** (step / STEPS_PER_OCTAVE))
        if point > rows[-1]:
            rows.append(point)
    raise AssertionError


def head_columns(output_projection: nn.Module, num_heads: int, head_dim: int, like: Tensor) -> Tensor:
    """What each head's output is multiplied with, whatever the projection consists of: `[heads, head_dim, hidden]`."""
    unit = torch.eye(num_heads * head_dim, dtype=like.dtype, device=like.device)
    columns = output_projection(unit) - output_projection(torch.zeros_like(unit[:1]))
    return columns.view(num_heads, head_dim, -1)


def distortions(
    query: Tensor, key: Tensor, value: Tensor, ranking: Tensor, rows: list[int], scaling: float, columns: Tensor
) -> Tensor:
    """‖W_o (o_r - o_full)‖ of every head, answer token and number of rows r: `[len(rows), num_query_heads, n]`.

    o_r attends to the window, the first r - window columns of the ranking, and the generated rows.

    Args:
        query: `[num_query_heads, n, head_dim]` of the answer's tokens, after RoPE.
        key, value: `[num_kv_heads, prompt + n, head_dim]`.
        ranking: int64 `[num_kv_heads, prompt - window]`, the columns before the window, best first.
        rows: Ascending, from the window's size, below the prompt's length.
        scaling: Factor of the logits.
        columns: From `head_columns`.
    """
    num_kv_heads, total, head_dim = key.shape
    compute = torch.promote_types(query.dtype, torch.float32)
    queries = query.shape[1]
    grouped = query.to(compute).view(num_kv_heads, -1, queries, head_dim)
    # The ranking's columns first, in its order; window and generated rows, which every r has, behind them.
    behind = torch.arange(ranking.shape[1], total, device=key.device).expand(num_kv_heads, -1)
    order = torch.cat([ranking, behind], dim=1)[..., None].expand(-1, -1, head_dim)
    key, value = key.gather(1, order).to(compute)[:, None], value.gather(1, order).to(compute)[:, None]
    logits = grouped @ key.transpose(-1, -2) * scaling
    generated_later = torch.ones(queries, queries, dtype=torch.bool, device=key.device).triu(1)
    logits[..., total - queries :].masked_fill_(generated_later, float("-inf"))
    weights = (logits - logits.amax(-1, keepdim=True)).exp()

    def sums(begin: int, end: int) -> tuple[Tensor, Tensor]:
        part = weights[..., begin:end]
        return part @ value[:, :, begin:end], part.sum(-1, keepdim=True)

    outputs = []
    ranked, begin = ranking.shape[1], 0
    numerator, denominator = sums(ranked, total)
    for extra in [*(each - rows[0] for each in rows), ranked]:
        more, mass = sums(begin, extra)
        numerator, denominator, begin = numerator + more, denominator + mass, extra
        outputs.append(numerator / denominator)
    columns = columns.to(compute).view(num_kv_heads, -1, head_dim, columns.shape[-1])
    lost = [((output - outputs[-1]) @ columns).norm(dim=-1).flatten(0, 1) for output in outputs[:-1]]
    return torch.stack(lost)

"""Which prompt rows each kv head keeps: SnapKV's scoring of positions, and the choice of rows (spec section 2).

Rows reach `choose_rows` right-aligned: row list (b, h) occupies the columns `starts[b, h] ..` to the last one. The host
knows the number of rows kept for every method whose budgets depend on the prompt length only, and their sum under AdaKV
with `exact` rounding, so no device is waited for in a first prompt (AdaKV waits once a layer with `paper` rounding, and
under tensor parallelism).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import pad

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.methods import PromptStates, pooled_window_scores
from sparsemm.plan import Plan


@dataclass(frozen=True)
class KeptRows:
    """The rows that one layer keeps, as ragged lists: all of (batch row 0, kv head 0), then of (0, 1), ...

    Attributes:
        positions: int32 `[total]`, columns of the keys, ascending in each list.
        kept: int32 `[batch, num_kv_heads]`, rows of each list.
        cu_kept: int32 `[batch * num_kv_heads + 1]`, where each list begins in `positions`.
        total: All rows, known to the host.
    """

    positions: Tensor
    kept: Tensor
    cu_kept: Tensor
    total: int


def choose_rows(plan: Plan, layer_idx: int, states: PromptStates, prompt_lengths: list[int | None]) -> KeptRows:
    """Choose the rows that one layer keeps, for methods that can tell while it runs (`Plan.decides_last`).

    Args:
        plan: Method and model shape.
        layer_idx: Which layer.
        states: With `starts` and `num_queries` on the CPU.
        prompt_lengths: Valid tokens seen of each sequence, which the budgets are computed for. More than a list holds
            when earlier turns dropped rows: a head keeps what its budget allows of the rows it has. None for a sequence
            that keeps them all.
    """
    method = plan.method
    if plan.rankings is not None:
        (ranking,) = _upload(states.key.device, plan.rankings[layer_idx, plan.parallel.own(plan.num_kv_heads)])
        states = dataclasses.replace(states, ranking=ranking.bool())
    if method.layer_budgets is not None and not all(is_covered(plan.config, length) for length in prompt_lengths):
        return _choose_by_scores(plan, states, prompt_lengths)
    covered = method.layer_budgets is not None or method.prompt_budgets is not None
    budgets = [None if covered or length is None else plan.own_budgets(length)[layer_idx] for length in prompt_lengths]
    return keep_best(
        states.key, states.starts, states.window_size, budgets, lambda starts: _scores(plan, states, starts)
    )


def keep_best(
    key: Tensor,
    starts: Tensor,
    window_size: int,
    budgets: Sequence[LongTensor | None],
    score: Callable[[Tensor], Tensor] | None = None,
) -> KeptRows:
    """The window and the best other rows, as many as each list has or its budget says.

    Args:
        key, starts, window_size: As in `PromptStates`, the starts on the CPU.
        budgets: int64 `[num_kv_heads]` of each sequence, window included; None for one that keeps all rows.
        score: Makes float32 `[batch, num_kv_heads, columns]` from the starts on the device; not needed where every
            sequence keeps all rows.
    """
    seq_len, device = key.shape[2], key.device
    window = min(window_size, seq_len)
    available = seq_len - starts.long()
    wanted = torch.stack([have if rows is None else rows for rows, have in zip(budgets, available, strict=True)])
    kept = torch.minimum(torch.maximum(wanted, available.clamp(max=window)), available)
    beyond_window = kept - available.clamp(max=window)
    cu_kept = pad(kept.flatten().cumsum(0), (1, 0))
    total = int(cu_kept[-1])
    kept_device, cu_kept_device, starts, counts = _upload(device, kept, cu_kept, starts, beyond_window)
    if bool(((beyond_window == 0) | (kept == available)).all()):  # every list keeps its last rows: nothing to rank
        first = seq_len - kept_device.flatten() - cu_kept_device[:-1]
        positions = torch.arange(total, dtype=torch.int32, device=device)
        positions += first.repeat_interleave(kept_device.flatten(), output_size=total)
        return KeptRows(positions, kept_device, cu_kept_device, total)
    positions = _select(score(starts), starts, counts, window, cu_kept_device, total)
    return KeptRows(positions, kept_device, cu_kept_device, total)


def score_layer(plan: Plan, states: PromptStates) -> tuple[Tensor, Tensor]:
    """Scores of the columns before the window, and what `Plan.prompt_budgets` wants to know of the layer."""
    (starts,) = _upload(states.key.device, states.starts)
    return plan.method.score_layer(plan.config, _on_device(plan, states, starts))


def _scores(plan: Plan, states: PromptStates, starts: Tensor) -> Tensor:
    scorer = plan.method.score_positions or pooled_window_scores
    return scorer(plan.config, _on_device(plan, states, starts))


def _on_device(plan: Plan, states: PromptStates, starts: Tensor) -> PromptStates:
    """What a scorer is shown. Raises `ConfigError` where something that it reads was not given."""
    missing = [name for name in plan.method.sees if getattr(states, name) is None]
    if missing:
        raise ConfigError(
            f"method={plan.method.name!r} ranks positions by {' and '.join(missing)}, which only a patched model has, "
            "given input_ids; use it under sparsemm.patch or sparsemm.generate"
        )
    (num_queries,) = _upload(starts.device, states.num_queries)
    return dataclasses.replace(states, starts=starts, num_queries=num_queries)


def take_columns(states: Tensor, order: Tensor) -> Tensor:
    """`states` `[batch, heads, columns, head_dim]` with each batch row's columns in `order`, int64 `[batch, n]`."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def select_positions(
    query: Tensor,
    key: Tensor,
    config: CompressionConfig,
    *,
    layer_idx: int,
    num_layers: int,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    value: Tensor | None = None,
) -> list[list[LongTensor]]:
    """The prompt positions that each kv head of one layer keeps.

    Args:
        query: `[batch, num_query_heads, seq_len, head_dim]` after RoPE, any floating dtype.
        key: `[batch, num_kv_heads, seq_len, head_dim]` after RoPE.
        config: Method, budget and their settings.
        layer_idx: Which of the `num_layers` layers the tensors belong to.
        num_layers: Layers of the language model.
        attention_mask: `[batch, seq_len]`, 1 = valid; padding may lie anywhere. None: every column is valid.
        scaling: Factor of the attention logits, the attention module's own; None is head_dim ** -0.5.
        value: Like `key`, for methods that rank by values.

    Returns:
        Per batch row, per kv head: sorted int64 columns of the given tensors. Padding columns are never among them.

    Raises:
        ValueError: The tensors do not belong together.
        ConfigError: The method looks at more than these tensors.
        HeadScoreError: The head scores do not fit `num_layers` and the query heads.
    """
    _check_states(query, key, layer_idx, num_layers, attention_mask)
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {list(value.shape)} does not belong to key {list(key.shape)}")
    batch, num_query_heads, seq_len, _ = query.shape
    num_kv_heads = key.shape[1]
    order = None
    lengths = torch.full((batch,), seq_len)
    if attention_mask is not None:
        valid = attention_mask.to(key.device) != 0
        lengths = valid.sum(1).cpu()
        order = valid.int().argsort(dim=1, stable=True)  # padding to the left, valid columns in their order
        query, key = (take_columns(states, order) for states in (query, key))
        value = None if value is None else take_columns(value, order)
    plan = Plan(config, num_layers, num_query_heads, num_kv_heads)
    if plan.decides_last(lengths.tolist()):
        raise ConfigError(
            f"the budgets of method={config.method!r} depend on every layer of a prompt; use it under sparsemm.patch, "
            "and read handle.stats"
        )
    states = PromptStates(
        query,
        key,
        starts=(seq_len - lengths).int()[:, None].expand(-1, num_kv_heads),
        num_queries=lengths.int(),
        window_size=config.window_size,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        value=value,
    )
    rows = choose_rows(plan, layer_idx, states, lengths.tolist())
    lists = list(rows.positions.long().split(rows.kept.flatten().tolist()))
    if order is not None:
        lists = [order[index // num_kv_heads, positions] for index, positions in enumerate(lists)]
    return [lists[row * num_kv_heads : (row + 1) * num_kv_heads] for row in range(batch)]


def _choose_by_scores(plan: Plan, states: PromptStates, prompt_lengths: list[int | None]) -> KeptRows:
    """`choose_rows` for methods whose budgets depend on the scores of the layer (AdaKV)."""
    config, method = plan.config, plan.method
    num_kv_heads, seq_len = states.key.shape[1:3]
    window = min(config.window_size, seq_len)
    available = seq_len - states.starts
    covered = torch.tensor([is_covered(config, length) for length in prompt_lengths])[:, None].expand_as(states.starts)
    starts, available_device, covered_device = _upload(states.key.device, states.starts, available, covered)
    scores = _scores(plan, states, starts)
    # The rule looks at all heads of the layer, whichever process has them.
    every_score, every_start = (plan.parallel.gather(each, dim=1) for each in (scores, starts))
    valid = torch.arange(states.columns, device=starts.device) >= every_start[..., None]
    in_window = available_device.clamp(max=window)
    chosen = method.layer_budgets(config, every_score, valid).int()[:, plan.parallel.own(plan.num_kv_heads)]
    beyond_window = torch.minimum(chosen, available_device - in_window)
    beyond_window = torch.where(covered_device.bool(), available_device - in_window, beyond_window)
    kept = beyond_window + in_window
    cu_kept = pad(kept.flatten().cumsum(0, dtype=torch.int32), (1, 0))
    everything_there = available.tolist() == [[length] * num_kv_heads for length in prompt_lengths]
    if config.rounding == "exact" and everything_there and not plan.parallel.divided:
        total = num_kv_heads * sum(min(config.budget, length) for length in prompt_lengths)
    else:
        total = int(cu_kept[-1])
    positions = _select(scores, starts, beyond_window, window, cu_kept, total)
    return KeptRows(positions, kept, cu_kept, total)


def is_covered(config: CompressionConfig, prompt_length: int | None) -> bool:
    """Whether a layer-wise method leaves such a prompt uncompressed (spec section 3; `paper` jumps at the budget)."""
    if prompt_length is None:
        return True
    if config.rounding == "paper":
        return config.budget > prompt_length
    return config.budget >= prompt_length


def _select(scores: Tensor, starts: Tensor, counts: Tensor, window: int, cu_kept: Tensor, total: int) -> Tensor:
    flat = scores.flatten(0, 1).contiguous()
    return torch.ops.sparsemm.select_rows(flat, starts.flatten(), counts.flatten(), window, cu_kept, total)


def _upload(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors as int32 on `device`, moved in one piece and without waiting for it."""
    packed = torch.cat([tensor.flatten().int() for tensor in tensors]).to(device, non_blocking=True)
    pieces = packed.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _check_states(query: Tensor, key: Tensor, layer_idx: int, num_layers: int, attention_mask: Tensor | None) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query must be [B, Hq, T, D] and key [B, Hkv, T, D], got {list(query.shape)} and {list(key.shape)}"
        )
    (batch, num_query_heads, seq_len, head_dim), num_kv_heads = query.shape, key.shape[1]
    if key.shape != (batch, num_kv_heads, seq_len, head_dim) or num_kv_heads == 0 or num_query_heads % num_kv_heads:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} differ in batch, length or head_dim, or query heads "
            "do not divide among kv heads"
        )
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx={layer_idx} is not one of num_layers={num_layers} layers")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, seq_len):
        raise ValueError(f"attention_mask must be [{batch}, {seq_len}], got {list(attention_mask.shape)}")

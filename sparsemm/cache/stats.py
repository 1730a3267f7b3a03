"""The figures that a cache leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import LongTensor, Tensor

from sparsemm.cache.chunk import Columns
from sparsemm.errors import CacheError
from sparsemm.plan import Plan


@dataclass(frozen=True)
class CacheStats:
    """What a cache kept of its prompts, read by `PatchHandle.stats`.

    Attributes:
        prompt_tokens: Valid prompt tokens of each sequence.
        kept_rows: LongTensor `[batch, num_layers, num_kv_heads]`, prompt rows kept, without generated rows or slack.
        nominal_budget: The budget asked for; None for methods that keep every row.
        effective_budgets: Kept prompt rows / (L * Hkv), per sequence.
        cache_bytes: Bytes held now, by all processes that hold the model: rows, slack, masks and index tensors.
        bytes_by_rank: The same of each of these processes.
        full_cache_bytes: Bytes of the keys and values of all tokens seen so far, padding excluded.
        token_bytes: Bytes of the keys and values of one token in all layers.
        sliding_bytes: Bytes held beside `cache_bytes` by layers with a sliding window, which keep transformers' own
            cache; L, `kept_rows` and the other bytes count the layers with ragged rows only.
    """

    method: str
    rounding: str
    prompt_tokens: list[int]
    kept_rows: LongTensor
    nominal_budget: int | None
    effective_budgets: list[float]
    cache_bytes: int
    full_cache_bytes: int
    token_bytes: int
    bytes_by_rank: list[int]
    sliding_bytes: int = 0

    @property
    def effective_budget(self) -> float:
        """Mean of `effective_budgets` over the sequences."""
        return sum(self.effective_budgets) / len(self.effective_budgets)


def share_of_full(kept_rows: float, prompt_tokens: float, new_tokens: float) -> float:
    """What share of a full cache's rows a compressed one has: both for the same prompt and the same new tokens.

    The one definition of "% of full": 1 for a full cache whatever room it has, and the same for every method however
    many tokens it generated itself. Slots without a row (slack) and index tensors are not in it.

    Args:
        kept_rows: Prompt rows a kv head, mean over the heads.
        prompt_tokens: Prompt rows a kv head of the full cache.
        new_tokens: For which both have a row.
    """
    return (kept_rows + new_tokens) / (prompt_tokens + new_tokens)


@dataclass
class CacheRecord:
    """The figures behind `CacheStats`. Outlives its cache, holds none of the buffers."""

    plan: Plan
    prompt_tokens: list[int] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # of each layer, int32 [batch * num_kv_heads], on its device
    columns: Columns = field(default_factory=Columns)
    rope_deltas: Tensor | None = None  # M-RoPE offset of generated tokens, int64 [batch, 1]
    layer_bytes: dict[int, int] = field(default_factory=dict)
    sliding_bytes: dict[int, int] = field(default_factory=dict)  # of layers that keep transformers' own cache
    row_bytes: int = 0  # one key row and one value row

    def memory_bytes(self) -> int:
        """Bytes held by the layers with ragged rows and beside them, in this process."""
        beside = (self.columns.mask, self.rope_deltas)
        return sum(self.layer_bytes.values()) + sum(tensor.nbytes for tensor in beside if tensor is not None)

    def stats(self) -> CacheStats:
        """Of all heads; under tensor parallelism every process has to ask. Raises `CacheError` before a prompt has gone
        through all layers."""
        plan = self.plan
        if not self.kept:
            raise CacheError("no prompt has been through the model yet; call generate, then read the statistics")
        kept = torch.stack([rows.long().cpu().view(-1, plan.own_kv_heads) for rows in self.kept], dim=1)
        shares = plan.parallel.collect((kept, self.memory_bytes(), sum(self.sliding_bytes.values())))
        if plan.parallel.divided:
            kept = torch.cat([share for share, _, _ in shares], dim=2)
        bytes_by_rank = [held for _, held, _ in shares]
        token_bytes = self.row_bytes * plan.num_kv_heads * plan.num_layers
        return CacheStats(
            method=plan.config.method,
            rounding=plan.config.rounding,
            prompt_tokens=list(self.prompt_tokens),
            kept_rows=kept,
            nominal_budget=plan.config.budget if plan.method.compresses else None,
            effective_budgets=kept.double().mean(dim=(1, 2)).tolist(),
            cache_bytes=sum(bytes_by_rank),
            full_cache_bytes=sum(self.columns.lengths()) * token_bytes,
            token_bytes=token_bytes,
            bytes_by_rank=bytes_by_rank,
            sliding_bytes=sum(sliding for _, _, sliding in shares),
        )

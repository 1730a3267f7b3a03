"""One answer: its text, its tokens, what the cache did for it, and how lmms-eval is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from torch import LongTensor

from sparsemm.cache import CacheStats, share_of_full

if TYPE_CHECKING:
    from sparsemm.decoding.generation import Timing

RECORD_VERSION = 2
"""Of what is noted of an answer."""


@dataclass
class SampleCounts(TokenCounts):
    """Token counts of one answer, and what the cache did for it: lmms-eval logs both with the sample.

    Attributes:
        figures: JSON values: `nominal_budget`, `effective_budget` (this prompt's kept rows per kv head),
            `cache_bytes` and `full_cache_bytes` (the batch's, divided by its size), `cache_share` (`share_of_full` for
            as many new tokens as the task allows), `ms_per_token` (one decoding step of the batch; None when nothing
            was decoded), `prefill_ms` (divided by the batch's size), `config`.
    """

    figures: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **(self.figures or {})}


def count_tokens(tokens: LongTensor, ends: int | list[int]) -> list[int]:
    """Tokens of each answer `[batch, new_tokens]` up to the first of `ends`, that one included."""
    stops = torch.isin(tokens, torch.as_tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return [int(row.nonzero()[0]) + 1 if bool(row.any()) else tokens.shape[1] for row in stops]


def figures_of(stats: CacheStats, clock: Timing, limit: int) -> list[dict[str, Any]]:
    """Of every answer of a batch, as JSON values; `limit` is the longest answer that the task allows."""
    size = len(stats.prompt_tokens)
    same = {
        "nominal_budget": stats.nominal_budget,
        "cache_bytes": stats.cache_bytes / size,
        "full_cache_bytes": stats.full_cache_bytes / size,
        "ms_per_token": 1000 * clock.decode_seconds / clock.decode_steps if clock.decode_steps else None,
        "prefill_ms": 1000 * clock.prefill_seconds / size,
        "batch_size": size,
    }
    return [
        {**same, "input_tokens": tokens, "effective_budget": rows, "cache_share": share_of_full(rows, tokens, limit)}
        for tokens, rows in zip(stats.prompt_tokens, stats.effective_budgets, strict=True)
    ]


def result_of(record: dict[str, Any], config: dict[str, Any]) -> GenerationResult:
    """A noted answer as lmms-eval takes it, its figures and the settings beside it."""
    figures = {name: value for name, value in record.items() if name not in ("text", "input_tokens", "output_tokens")}
    counts = SampleCounts(record["input_tokens"], record["output_tokens"], figures={**figures, "config": config})
    return GenerationResult(record["text"], counts)


def cut(text: str, until: str | list[str] | None) -> str:
    """`text` up to the first of the task's stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(stop)[0]
    return text.strip()


def log_speed(records: list[dict[str, Any]]) -> None:
    """Hand lmms-eval the figures of this process for the `throughput` part of its results."""
    timed = [record for record in records if record["ms_per_token"] is not None]
    seconds = sum(each["ms_per_token"] * each["output_tokens"] / each["batch_size"] for each in timed) / 1000
    tokens = sum(record["output_tokens"] for record in records)
    names = ("effective_budget", "cache_bytes", "full_cache_bytes", "cache_share")
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={name: sum(record[name] for record in records) / len(records) for name in names},
    )

"""What the method costs in arithmetic and in Python, without a GPU: ratios of medians, measured in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

import sparsemm
from sparsemm.bench.shapes import prompt_inputs
from sparsemm.cache import CacheRecord, SparseLayer
from sparsemm.cache.chunk import Chunk
from sparsemm.decoding.generation import stock_greedy
from sparsemm.plan import Plan

VICUNA = {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "prompt_tokens": 4096, "budget": 256}


def layer_costs(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    prompt_tokens: int,
    budget: int,
    repeats: int = 9,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Milliseconds of one layer: choosing and compacting its rows, and appending a token, against the plain way.

    The plain way: one head at a time, scores, top-k, gather and concatenation; and a new cache with every row copied
    for every token. The two take turns, so that what disturbs one disturbs the other. Also bytes held and the formula.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, prompt_tokens, head_dim, generator=generator, dtype=dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    scores = sparsemm.HeadScores(torch.rand(1, num_heads, generator=generator, dtype=torch.float64) ** 20)
    config = sparsemm.CompressionConfig("sparsemm", budget, scores)
    plan = Plan(
        config=config,
        num_layers=1,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    budgets = plan.budgets(prompt_tokens)[0].tolist()
    prompt, step = Chunk.of(None, 1, prompt_tokens, needs_lengths=True), Chunk.of_step(1)
    layer = SparseLayer(plan, 0, CacheRecord(plan, prompt_tokens=[prompt_tokens]))

    def compress() -> None:
        layer.store_prompt(query, key, value, prompt, head_dim**-0.5)

    rows: list[tuple[Tensor, Tensor]] = []

    def compress_plainly() -> None:
        rows[:] = _per_head(query, key, value, budgets, config)

    compressing = _alternate(compress, compress_plainly, repeats)
    kept, held = int(layer.lens.sum()), layer.memory_bytes()
    new_key, new_value = (torch.randn(1, num_kv_heads, 1, head_dim, dtype=dtype) for _ in range(2))

    def append() -> None:
        layer._append(new_key, new_value, step)

    def append_by_copying() -> None:
        rows[:] = [
            (torch.cat([keys, new_key[0, head]]), torch.cat([values, new_value[0, head]]))
            for head, (keys, values) in enumerate(rows)
        ]

    flat = [torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])]

    def append_flat() -> None:
        """The original's: one new flat buffer for the layer, every row copied into it."""
        for index, buffer in enumerate(flat):
            larger = buffer.new_empty(buffer.shape[0] + num_kv_heads, head_dim)
            larger[: buffer.shape[0]].copy_(buffer)
            flat[index] = larger

    appends = min(48, plan.reserve // 2 - 2)
    appending = _alternate(append, append_by_copying, appends)
    copying = _alternate(append, append_flat, min(appends, plan.reserve - appends - 4))
    row = 2 * head_dim * key.element_size()
    slack = plan.reserve * num_kv_heads
    return {
        "compress_ms": compressing[0],
        "compress_per_head_ms": compressing[1],
        "compress_ratio": compressing[1] / compressing[0],
        "append_ms": appending[0],
        "append_per_head_copy_ms": appending[1],
        "append_ratio": appending[1] / appending[0],
        "append_flat_copy_ms": copying[1],
        "append_flat_ratio": copying[1] / copying[0],
        "rows_kept": kept,
        "rows_by_formula": budget * num_kv_heads,
        "bytes_held": held,
        "bytes_by_formula": (budget * num_kv_heads + slack) * row + 4 * (2 * num_kv_heads + 2),
    }


def _per_head(
    query: Tensor, key: Tensor, value: Tensor, budgets: list[int], config: sparsemm.CompressionConfig
) -> list[tuple[Tensor, Tensor]]:
    """SnapKV's choice of rows written out for one head after the other."""
    window, length = config.window_size, key.shape[2]
    group = query.shape[1] // key.shape[1]
    causal = torch.ones(window, window, dtype=torch.bool).tril()
    rows = []
    for head, kept in enumerate(budgets):
        totals = torch.zeros(length - window)
        for each in range(head * group, (head + 1) * group):
            logits = query[0, each, -window:].float() @ key[0, head].float().T / query.shape[-1] ** 0.5
            logits[:, -window:] = logits[:, -window:].masked_fill(~causal, float("-inf"))
            totals += logits.softmax(-1)[:, :-window].mean(0) / group
        pooled = avg_pool1d(totals[None], config.kernel_size, stride=1, padding=config.kernel_size // 2)[0]
        chosen = pooled.topk(min(kept - window, length - window)).indices.sort().values
        rows.append(
            (
                torch.cat([key[0, head, chosen], key[0, head, -window:]]),
                torch.cat([value[0, head, chosen], value[0, head, -window:]]),
            )
        )
    return rows


def token_overhead(
    model: nn.Module, *, prompt_tokens: int = 220, tokens: int = 64, rounds: int = 7, budget: int = 64, window: int = 4
) -> dict[str, float]:
    """Milliseconds a token of the unpatched model, of the patched one and of `sparsemm.generate`; medians over rounds.

    A miniature's matrices are so small that this is the time of Python and of dispatching operators.
    """
    inputs = prompt_inputs(model, prompt_tokens)
    config = sparsemm.CompressionConfig("snapkv", budget, window_size=window)
    never = {"eos_token_id": None, "pad_token_id": 0}

    def stock() -> float:
        _, (_, *steps) = stock_greedy(model, inputs, tokens, **never)
        return statistics.mean(steps)

    def patched() -> float:
        with sparsemm.patch(model, config, reserve=tokens):
            return stock()

    def own_loop() -> float:
        output = sparsemm.generate(model, inputs, config, max_new_tokens=tokens, do_sample=False, **never)
        return output.decode_seconds / (tokens - 1)

    def patched_full() -> float:
        with sparsemm.patch(model, sparsemm.CompressionConfig("fullkv"), reserve=tokens):
            return stock()

    runs = {"unpatched": stock, "patched": patched, "patched_full_cache": patched_full, "own_loop": own_loop}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            found = run()
            if round_:  # the first round warms up
                seconds[name].append(found)
    result = {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}
    # Ratios within a round: what slows one slows its neighbours.
    for name in ("patched", "patched_full_cache", "own_loop"):
        pairs = zip(seconds[name], seconds["unpatched"], strict=True)
        result[f"{name}_ratio"] = statistics.median(own / other for own, other in pairs)
    return result


def _alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median milliseconds of each, taking turns, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for run, measured in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                measured.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])

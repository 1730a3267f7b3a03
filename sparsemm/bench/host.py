"""What the method costs in arithmetic and in Python, without a GPU: ratios of medians, measured in one process."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

import sparsemm
from sparsemm.bench.cells import BenchResults, Times, ratio_of, run_benchmark, take_turns
from sparsemm.bench.measure import NEVER_ENDS
from sparsemm.bench.shapes import prompt_inputs, skewed_head_scores
from sparsemm.bench.steps import kernel_counts, middle_size, operator_costs
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
) -> tuple[Times, dict[str, Any]]:
    """One layer: choosing and compacting its rows, and appending a token, against the plain way.

    The plain way: one head at a time, scores, top-k, gather and concatenation; and a new cache with every row copied
    for every token, list by list or as one flat buffer. The two take turns. Also bytes held and the formula.
    """
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, prompt_tokens, head_dim, generator=generator, dtype=dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    config = sparsemm.CompressionConfig("sparsemm", budget, skewed_head_scores(1, num_heads))
    plan = Plan(config, num_layers=1, num_query_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    budgets = plan.budgets(prompt_tokens)[0].tolist()
    prompt = Chunk(1, prompt_tokens, lengths=[prompt_tokens], prompt_lengths=[prompt_tokens])
    step = Chunk.of_step(1)
    layer = SparseLayer(plan, 0, CacheRecord(plan))
    rows: list[tuple[Tensor, Tensor]] = []

    def compress_plainly() -> None:
        rows[:] = _per_head(query, key, value, budgets, config)

    ways = {
        "compress": lambda: layer.store_prompt(query, key, value, prompt, head_dim**-0.5),
        "compress_per_head": compress_plainly,
    }
    times = take_turns(ways, repeats, cpu)
    kept, held = int(layer.lens.sum()), layer.memory_bytes()
    new_key, new_value = (torch.randn(1, num_kv_heads, 1, head_dim, dtype=dtype) for _ in range(2))

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

    ways = {
        "append": lambda: layer._append(new_key, new_value, step),
        "append_per_head_copy": append_by_copying,
        "append_flat_copy": append_flat,
    }
    times |= take_turns(ways, min(48, plan.reserve - 4), cpu)
    row = 2 * head_dim * key.element_size()
    slack = plan.reserve * num_kv_heads
    return times, {
        "compress_ratio": ratio_of(times, "compress_per_head", "compress"),
        "append_ratio": ratio_of(times, "append_per_head_copy", "append"),
        "append_flat_ratio": ratio_of(times, "append_flat_copy", "append"),
        "rows_kept": kept,
        "rows_by_formula": budget * num_kv_heads,
        "bytes_held": held,
        "bytes_by_formula": (budget * num_kv_heads + slack) * row + 4 * (4 * num_kv_heads + 2),
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
) -> tuple[Times, dict[str, Any]]:
    """Seconds a token of the unpatched model, of the patched one and of `sparsemm.generate`, taking turns; and ratios.

    A miniature's matrices are so small that this is the time of Python and of dispatching operators.
    """
    inputs = prompt_inputs(model, prompt_tokens)
    config = sparsemm.CompressionConfig("snapkv", budget, window_size=window)

    def stock(config: sparsemm.CompressionConfig | None = None) -> float:
        with nullcontext() if config is None else sparsemm.patch(model, config, reserve=tokens):
            _, (_, *steps) = stock_greedy(model, inputs, tokens, **NEVER_ENDS)
        return statistics.mean(steps)

    def own_loop() -> float:
        output = sparsemm.generate(model, inputs, config, max_new_tokens=tokens, do_sample=False, **NEVER_ENDS)
        return output.decode_seconds / (tokens - 1)

    ways = {
        "unpatched": stock,
        "patched": lambda: stock(config),
        "patched_full_cache": lambda: stock(sparsemm.CompressionConfig("fullkv")),
        "own_loop": own_loop,
    }
    turns = [{name: run() for name, run in ways.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    times = {name: [turn[name] for turn in turns] for name in ways}
    return times, {f"{name}_ratio": ratio_of(times, name, "unpatched") for name in ways if name != "unpatched"}


def run(
    model: nn.Module,
    *,
    model_name: str,
    prompt_tokens: int = VICUNA["prompt_tokens"],
    budget: int = VICUNA["budget"],
    rounds: int = 7,
    output: Path | None = None,
) -> BenchResults:
    """All parts, measured anew: `layer` at Vicuna's shape with the prompt and budget given, `token` of `model`,
    `kernels` of steps by family; by dtype, a `step` of a middle size with that prompt and budget, and its `operators`
    around attention."""
    shape = {**VICUNA, "prompt_tokens": prompt_tokens, "budget": budget}
    sizes = {"prompt_tokens": prompt_tokens, "budget": budget}
    parts = {
        "layer": lambda: layer_costs(**shape),
        "token": lambda: token_overhead(model, rounds=rounds),
        "kernels": lambda: ({}, kernel_counts()),
        "step, float32": lambda: middle_size(torch.float32, **sizes),
        "step, bfloat16": lambda: middle_size(torch.bfloat16, **sizes),
        "operators, float32": lambda: operator_costs(torch.float32),
        "operators, bfloat16": lambda: operator_costs(torch.bfloat16),
    }

    def measure(place: dict[str, Any], _: Any) -> tuple[Times, dict[str, Any]]:
        return parts[place["part"]]()

    with torch.no_grad():
        return run_benchmark(
            "host",
            [{"part": name, **(shape if name == "layer" else {})} for name in parts],
            measure,
            device=torch.device("cpu"),
            settings={"model": model_name, "rounds": rounds},
            output=output,
            fresh=True,
            progress=False,
        )

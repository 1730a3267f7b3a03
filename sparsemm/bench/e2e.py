"""Speed and memory of whole models, by method, prompt length, budget and batch: cells written as they end."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsemm
from sparsemm.bench.cells import BenchResults, Tell, Times, check_axes, run_benchmark
from sparsemm.bench.measure import PROMPT_RUNS, PROMPT_SECONDS, SHORT_PROMPT, measure
from sparsemm.bench.memory import copy_bandwidth, row_bytes, step_weight_bytes, weight_bytes
from sparsemm.bench.shapes import attention_shape, prompt_inputs, skewed_head_scores
from sparsemm.bench.throughput import largest_batch
from sparsemm.errors import ConfigError
from sparsemm.methods import METHODS, get_method
from sparsemm.models.parallel import tensor_parallel_of
from sparsemm.ops.backends import resolve_backend

logger = logging.getLogger(__name__)

BASELINES = ("hf", "kvpress", "original")
"""`hf`: `model.generate` with the full cache; `kvpress`: its SnapKV, by `model.generate`; `original`: SparseMM's rows,
all of them copied at every token. Every other name is a method of this package."""


def make_workloads(
    methods: Sequence[str],
    budgets: Sequence[int],
    prompts: Sequence[int],
    batches: Sequence[int],
    throughput_prompts: Sequence[int],
) -> list[dict[str, Any]]:
    """The places of the grid, prompt by prompt: `kind`, `method`, `budget`, `prompt_tokens` and `batch`.

    Of kind `latency` (time and memory of a batch) or `throughput` (the largest batch that fits; `batch` is 0). `method`
    is one of the package or of `BASELINES`; `budget` is None for those that keep every row.

    Raises:
        ConfigError: An unknown method, or a number below 1.
    """
    check_axes({"prompts": prompts, "budgets": budgets, "batches": batches})
    for method in methods:
        if method not in BASELINES and method not in METHODS:
            known = ", ".join(sorted({*METHODS, *BASELINES}))
            raise ConfigError(f"method {method!r} is unknown; use one of {known}")
    pairs = [(name, budget) for name in dict.fromkeys(methods) for budget in (budgets if compresses(name) else [None])]
    places = []
    for prompt in prompts:
        kinds = [("latency", batch) for batch in batches] + [("throughput", 0)] * (prompt in throughput_prompts)
        places += [
            {"kind": kind, "method": name, "budget": budget, "prompt_tokens": prompt, "batch": batch}
            for kind, batch in kinds
            for name, budget in pairs
            if kind == "latency" or name not in ("kvpress", "original")
        ]
    return places


def compresses(method: str) -> bool:
    """Whether a method or baseline has a budget."""
    return method in ("kvpress", "original") or (method != "hf" and get_method(method).compresses)


def run(
    model: nn.Module,
    workloads: Sequence[dict[str, Any]],
    *,
    model_name: str,
    head_scores: Any = None,
    window_size: int = 32,
    limit_bytes: int | None = None,
    output: Path | None = None,
    fresh: bool = False,
    progress: bool = True,
    report: Tell = logger.info,
    steps: int = 100,
    warmup: int = 5,
    graph: bool | None = None,
    decode_backend: str = "auto",
) -> BenchResults:
    """Measure every workload that `output` does not hold yet. Each finished one is in the file at once.

    Args:
        model: Not patched; from `sparsemm.load_model` or `sparsemm.bench.shapes.random_model`.
        workloads: From `make_workloads`.
        model_name: Written in the results.
        head_scores: For `sparsemm` and `original`; by default skewed ones, which keep as many rows in all.
        window_size: Last prompt tokens, always kept.
        limit_bytes: Memory that `throughput` may fill; by default the whole GPU's, and no such cells on a CPU.
        output: Result file (JSON).
        fresh: Forget what it holds.
        progress: Show a progress bar.
        report: Called with what is going to be done, and about how long it takes.
        steps: Decode steps timed; their median is reported.
        warmup: Decode steps before them.
        graph: As for `sparsemm.generate`.
        decode_backend: As for `sparsemm.patch`.

    Raises:
        ConfigError: An unknown decode backend, or one that cannot serve this model here.
        DataError: `output` holds results of other settings.
    """
    resolve_backend(decode_backend, model.device, model.dtype, attention_shape(model.config).head_dim)
    device, shape, bandwidth = model.device, attention_shape(model.config), copy_bandwidth(model.device)
    parallel = tensor_parallel_of(model)
    if parallel.size > 1 and any(place["kind"] == "throughput" for place in workloads):
        raise ConfigError("the largest batch is not looked for in several processes: leave throughput_prompts empty")
    if limit_bytes is None and device.type == "cuda":
        limit_bytes = torch.cuda.get_device_properties(device).total_memory
    timed = {"steps": steps, "warmup": warmup, "graph": graph, "decode_backend": decode_backend}
    settings = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": device.type,
        "head_scores": "skewed" if head_scores is None else str(head_scores),
        "window_size": window_size,
        **timed,
        **({"tensor_parallel": parallel.size} if parallel.size > 1 else {}),
        "environment": {"copy_bytes_per_second": bandwidth},
    }
    scores = skewed_head_scores(shape.layers, shape.query_heads) if head_scores is None else head_scores

    @functools.cache
    def paces() -> tuple[float, float]:
        """Seconds of a prompt token and of a step, as a short prompt shows them."""
        times, _ = measure(
            model, prompt_inputs(model, SHORT_PROMPT), "fullkv", sparsemm.CompressionConfig("fullkv"), steps=3, warmup=1
        )
        return min(times["first_token"]) / SHORT_PROMPT, min(times["step"])

    def expect(place: dict[str, Any]) -> float:
        prompt_seconds, step_seconds = paces()
        tokens = place["prompt_tokens"] * max(1, place["batch"])
        read = tokens * row_bytes(model) if not compresses(place["method"]) else 0
        if place["kind"] == "throughput":
            return 2 * tokens * prompt_seconds + 22 * (step_seconds + limit_bytes / bandwidth)
        once = tokens * prompt_seconds
        # One run decodes, the others are as many as PROMPT_SECONDS allow.
        runs = 1 + min(PROMPT_RUNS, max(1.0, PROMPT_SECONDS / once))
        return runs * once + (warmup + steps) * (step_seconds + read / bandwidth)

    def measure_place(place: dict[str, Any], tell: Tell) -> tuple[Times, dict[str, Any]]:
        method, budget, prompt = place["method"], place["budget"], place["prompt_tokens"]
        name = {"hf": "fullkv", "kvpress": "snapkv", "original": "sparsemm"}.get(method, method)
        given = scores if get_method(name).needs_head_scores else None
        config = sparsemm.CompressionConfig(name, budget, given, window_size=window_size)
        inputs = prompt_inputs(model, prompt, place["batch"] or 1)
        if place["kind"] == "throughput":
            brief = {"steps": min(steps, 20), "decode_backend": decode_backend}
            return largest_batch(model, inputs, method, config, limit_bytes=limit_bytes, **brief)
        times, figures = measure(model, inputs, method, config, tell=tell, **timed)
        # What the timed steps read on average: every row kept, and half of those that they append.
        kept = min(budget, prompt) if compresses(method) else prompt
        rows = place["batch"] * (kept + warmup + steps // 2) * row_bytes(model)
        read = step_weight_bytes(model) + rows // parallel.size
        if figures["cache_bytes"] is None and not compresses(method):
            figures["cache_bytes"] = figures["full_cache_bytes"] // parallel.size
        held = figures["cache_bytes"]
        seconds = statistics.median(times["step"])
        return times, {
            **figures,
            "tokens_per_second": place["batch"] / seconds,
            "rest_bytes": None if held is None else figures["peak_bytes"] - weight_bytes(model) - held,
            "floor_seconds": read / bandwidth,
            "floor_share": read / bandwidth / seconds,
        }

    places = [place for place in workloads if place["kind"] == "latency" or limit_bytes is not None]
    return run_benchmark(
        "e2e", places, measure_place, device=device, settings=settings, output=output, fresh=fresh, progress=progress,
        expect=expect, report=report,
    )  # fmt: skip

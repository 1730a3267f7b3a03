"""Speed and memory of whole models, by method, prompt length, budget and batch: cells written as they end."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsemm
from sparsemm.bench.measure import (
    BASELINES,
    copy_bandwidth,
    full_cache_bytes,
    measure,
    release_memory,
    row_bytes,
    step_weight_bytes,
    weight_bytes,
)
from sparsemm.bench.shapes import prompt_inputs, skewed_head_scores
from sparsemm.bench.throughput import largest_batch
from sparsemm.errors import ConfigError, DataError
from sparsemm.io import read_json, write_json_atomic
from sparsemm.methods import METHODS, get_method
from sparsemm.runs.results import environment

logger = logging.getLogger(__name__)

FORMAT = "sparsemm-e2e"
FORMAT_VERSION = 1
REPEATED_PROMPTS = 32 * 1024  # longer ones are run once: by then the first run's set-up is a small share


@dataclasses.dataclass(frozen=True)
class Workload:
    """One cell of the grid.

    Attributes:
        kind: `latency` (time and memory of a batch) or `throughput` (the largest batch that fits).
        method: A method of the package or one of `sparsemm.bench.measure.BASELINES`.
        budget: Rows per kv head; None for methods that keep every row.
        prompt_tokens: Tokens of every prompt.
        batch: Sequences; for `throughput` 0, as the batch is what is looked for.
    """

    kind: str
    method: str
    budget: int | None
    prompt_tokens: int
    batch: int


def make_workloads(
    methods: Sequence[str],
    budgets: Sequence[int],
    prompts: Sequence[int],
    batches: Sequence[int],
    throughput_prompts: Sequence[int],
) -> list[Workload]:
    """The grid, prompt by prompt. Raises `ConfigError` for an unknown method or a number below 1."""
    for name, values in (("prompts", prompts), ("budgets", budgets), ("batches", batches)):
        wrong = [value for value in values if value < 1]
        if wrong:
            raise ConfigError(f"{name} holds {wrong[0]}; give whole numbers of at least 1")
    for method in methods:
        if method not in BASELINES and method not in METHODS:
            known = ", ".join(sorted({*METHODS, *BASELINES}))
            raise ConfigError(f"method {method!r} is unknown; use one of {known}")
    workloads = []
    for prompt in prompts:
        for batch in batches:
            workloads += [Workload("latency", name, budget, prompt, batch) for name, budget in _pairs(methods, budgets)]
        if prompt in throughput_prompts:
            pairs = [pair for pair in _pairs(methods, budgets) if pair[0] not in ("kvpress", "original")]
            workloads += [Workload("throughput", name, budget, prompt, 0) for name, budget in pairs]
    return workloads


def _pairs(methods: Sequence[str], budgets: Sequence[int]) -> list[tuple[str, int | None]]:
    return [
        (method, budget) for method in dict.fromkeys(methods) for budget in (budgets if _compresses(method) else [None])
    ]


def _compresses(method: str) -> bool:
    return method in ("kvpress", "original") or (method != "hf" and get_method(method).compresses)


def run(
    model: nn.Module,
    workloads: Sequence[Workload],
    *,
    model_name: str,
    steps: int = 100,
    warmup: int = 5,
    head_scores: Any = None,
    window_size: int = 32,
    graph: bool | None = None,
    decode_backend: str = "auto",
    limit_bytes: int | None = None,
    output: Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure every workload that `output` does not hold yet. Each finished one is in the file at once.

    Args:
        model: Not patched; from `sparsemm.load_model` or `sparsemm.bench.shapes.random_model`.
        model_name: Written in the results.
        steps: Decode steps timed; their median is reported.
        warmup: Decode steps before them.
        head_scores: For `sparsemm` and `original`; by default skewed random ones, which keep as many rows in all.
        graph: As for `sparsemm.generate`.
        decode_backend: As for `sparsemm.patch`.
        limit_bytes: Memory that `throughput` may fill; by default the whole GPU's, and no such cells on a CPU.
        output: Result file (JSON).
        fresh: Forget what it holds.

    Returns:
        The document: `settings`, `environment`, `model`, `cells`.

    Raises:
        DataError: `output` holds results of other settings.
    """
    from tqdm import tqdm

    device = model.device
    settings = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "steps": steps,
        "warmup": warmup,
        "window_size": window_size,
        "graph": graph,
        "decode_backend": decode_backend,
        "device": device.type,
        "head_scores": "skewed" if head_scores is None else str(head_scores),
    }
    document = _open(output, settings, fresh)
    document["environment"] = environment(device)
    if "copy_bytes_per_second" not in document["model"]:
        document["model"] = {
            "weight_bytes": weight_bytes(model),
            "step_weight_bytes": step_weight_bytes(model),
            "row_bytes": row_bytes(model),
            "layers": model.config.get_text_config().num_hidden_layers,
            "copy_bytes_per_second": copy_bandwidth(device),
        }
    scores = skewed_head_scores(model) if head_scores is None else head_scores
    if limit_bytes is None and device.type == "cuda":
        limit_bytes = torch.cuda.get_device_properties(device).total_memory
    done = [{name: cell[name] for name in _KEY} for cell in document["cells"]]
    missing = [
        each
        for each in workloads
        if dataclasses.asdict(each) not in done and (each.kind == "latency" or limit_bytes is not None)
    ]
    if missing:  # the first run pays for set-up that no cell should be charged with
        measure(
            model, prompt_inputs(model, 64), "fullkv", _config("fullkv", None, scores, window_size), steps=3, warmup=0
        )
    with tqdm(total=len(missing), unit="cell", disable=not progress) as bar:
        for workload in missing:
            bar.set_description(f"{workload.method} {workload.prompt_tokens} {workload.kind}")
            cell = {**dataclasses.asdict(workload), "status": "ok"}
            try:
                config = _config(workload.method, workload.budget, scores, window_size)
                if workload.kind == "latency":
                    cell |= _latency(model, workload, config, steps, warmup, graph, decode_backend, document["model"])
                else:
                    inputs = prompt_inputs(model, workload.prompt_tokens)
                    found = largest_batch(
                        model,
                        inputs,
                        workload.method,
                        config,
                        steps=min(steps, 20),
                        limit_bytes=limit_bytes,
                        decode_backend=decode_backend,
                    )
                    cell |= {"status": "does not fit"} if found is None else dataclasses.asdict(found)
            except torch.cuda.OutOfMemoryError:
                cell["status"] = "out of memory"
            except ConfigError as error:  # a baseline that is not installed, a budget below the window
                cell["status"] = str(error)
            release_memory(device)
            document["cells"].append(cell)
            if output is not None:
                write_json_atomic(output, document)
            bar.update()
    return document


_KEY = tuple(field.name for field in dataclasses.fields(Workload))


def _config(method: str, budget: int | None, scores: Any, window_size: int) -> sparsemm.CompressionConfig:
    name = {"hf": "fullkv", "kvpress": "snapkv", "original": "sparsemm"}.get(method, method)
    given = scores if get_method(name).head_scores == "given" else None
    return sparsemm.CompressionConfig(name, budget, given, window_size=window_size)


def _latency(
    model: nn.Module,
    workload: Workload,
    config: sparsemm.CompressionConfig,
    steps: int,
    warmup: int,
    graph: bool | None,
    decode_backend: str,
    sizes: dict[str, Any],
) -> dict[str, Any]:
    inputs = prompt_inputs(model, workload.prompt_tokens, workload.batch)
    repeats = 2 if workload.prompt_tokens <= REPEATED_PROMPTS else 1
    found = measure(
        model,
        inputs,
        workload.method,
        config,
        steps=steps,
        warmup=warmup,
        repeats=repeats,
        graph=graph,
        decode_backend=decode_backend,
    )
    ms = found.ms_per_token
    # What the timed steps read on average: every row kept, and half of those that they append.
    full = workload.method == "hf" or not _compresses(workload.method)
    kept = workload.prompt_tokens if full else min(workload.budget, workload.prompt_tokens)
    cache_read = full_cache_bytes(model, workload.batch, kept + warmup + steps // 2)
    floor_ms = 1000 * (sizes["step_weight_bytes"] + cache_read) / sizes["copy_bytes_per_second"]
    cache_bytes = found.full_cache_bytes if found.cache_bytes is None and full else found.cache_bytes
    peak = found.peak_bytes
    rest = None if cache_bytes is None else peak - sizes["weight_bytes"] - cache_bytes
    ordered = sorted(found.steps)
    return {
        "ttft_ms": 1000 * statistics.median(found.prefill[1:] or found.prefill),
        "ms_per_token": ms,
        "ms_p10": 1000 * ordered[len(ordered) // 10],
        "ms_p90": 1000 * ordered[len(ordered) * 9 // 10],
        "tokens_per_second": 1000 * workload.batch / ms,
        "steps_timed": len(found.steps),
        "graph": found.graph,
        "effective_budget": found.effective_budget,
        "cache_bytes": cache_bytes,
        "full_cache_bytes": found.full_cache_bytes,
        "peak_bytes": peak,
        "rest_bytes": rest,
        "floor_ms": floor_ms,
        "floor_share": floor_ms / ms,
        "operators": found.operators,
        "launches": found.launches,
        "kernels": found.kernels,
    }


def _open(path: Path | None, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    empty = {"format": FORMAT, "version": FORMAT_VERSION, "settings": settings, "model": {}, "cells": []}
    if path is None or fresh or not path.exists():
        return empty
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != FORMAT_VERSION:
        raise DataError(f"{path} is no result file of this benchmark; choose another path, or start over with --fresh")
    if document["settings"] != settings:
        raise DataError(f"{path} holds results of other settings; choose another path, or start over with --fresh")
    return document

"""Time and memory of one prompt and its decode steps, under one method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import sparsemm
from sparsemm.bench.baselines import CopyingLoop, kvpress_snapkv
from sparsemm.bench.cells import Times, release_memory
from sparsemm.bench.memory import peak_new_bytes, row_bytes, weight_bytes
from sparsemm.bench.operators import count_kernels, count_operators
from sparsemm.decoding import DecodeLoop
from sparsemm.decoding.generation import stock_greedy

SPARE_ROWS = 8  # for the steps that count operators
NEVER_ENDS = {"eos_token_id": None, "pad_token_id": 0}

Figures = dict[str, Any]


def measure(
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: str,
    config: sparsemm.CompressionConfig,
    *,
    steps: int,
    warmup: int,
    repeats: int = 1,
    graph: bool | None = None,
    decode_backend: str = "auto",
) -> tuple[Times, Figures]:
    """Time `steps` decode steps behind `warmup` others, and the prompt `repeats` times, greedily and to full length.

    Returns:
        Seconds `first_token`, from the call, vision tower included, one value a repetition; and `step`, of each decode
        step of the whole batch. And:

        - `cache_bytes`: held at the end; None where the cache is not ours to ask. `full_cache_bytes`: keys and values
          of every token at the end. `effective_budget`: prompt rows kept per kv head.
        - `peak_bytes`: largest allocation, weights included: of the whole run on a GPU, of the prompt's tensors on a
          CPU.
        - `graph`: whether steps were replayed from a CUDA graph.
        - `operators` and `launches` dispatched in one step, the second without views; `kernels` that the GPU ran in
          one, None on a CPU.
    """
    batch, prompt_tokens = inputs["input_ids"].shape
    new_tokens = warmup + steps + 1
    release_memory(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    lengths = [1] * (repeats - 1) + [new_tokens]
    if method in ("hf", "kvpress"):
        press = nullcontext()
        if method == "kvpress":
            press = kvpress_snapkv(model, config.budget, config.window_size, prompt_tokens)
        with press:
            times, figures = _measure_stock(model, inputs, lengths)
    else:
        with sparsemm.patch(model, config, decode_backend=decode_backend) as handle:
            if method == "original":
                loop: DecodeLoop = CopyingLoop(handle, graph=False, time_steps=True)
            else:
                loop = DecodeLoop(handle, graph=graph, time_steps=True, reserve=new_tokens + SPARE_ROWS)
            times, figures = _measure_ours(model, inputs, loop, lengths)
    times["step"] = times["step"][warmup:]
    unknown = dict.fromkeys(("cache_bytes", "effective_budget", "operators", "launches", "kernels"))
    full = batch * (prompt_tokens + new_tokens - 1) * row_bytes(model)
    return times, {**unknown, "graph": False, "full_cache_bytes": full, **figures}


def _measure_ours(
    model: nn.Module, inputs: dict[str, Tensor], loop: DecodeLoop, lengths: list[int]
) -> tuple[Times, Figures]:
    def generate(tokens: int) -> float:
        unset = dict.fromkeys(("temperature", "top_p", "top_k"))
        options = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, **NEVER_ENDS, **unset}
        model.generate(**inputs, **options, custom_generate=loop)
        return loop.prefill_seconds

    times: Times = {"first_token": [generate(tokens) for tokens in lengths], "step": loop.step_seconds}
    figures: Figures = {
        "graph": loop.runner.captures > 0,
        "cache_bytes": loop.cache.memory_bytes(),
        "effective_budget": loop.cache.record.stats().effective_budget,
    }
    if not isinstance(loop, CopyingLoop):
        loop.cache.begin_steps()
        count = count_operators(loop.step)
        figures |= {"operators": count.total, "launches": count.launches}
        figures["kernels"] = count_kernels(loop.step, model.device)
    return times, {**figures, "peak_bytes": _peak_bytes(model, lambda: generate(1))}


def _measure_stock(model: nn.Module, inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Times, Figures]:
    prefill = []
    for tokens in lengths:
        _, (first, *steps) = stock_greedy(model, inputs, tokens, **NEVER_ENDS)
        prefill.append(first)
    figures = {"peak_bytes": _peak_bytes(model, lambda: stock_greedy(model, inputs, 1, **NEVER_ENDS))}
    short = {name: inputs[name][:, -8:] for name in ("input_ids", "attention_mask")}
    if not bool((short["input_ids"] == model.config.image_token_id).any()):  # one step more is one step
        longer, shorter = (
            count_operators(lambda tokens=tokens: stock_greedy(model, short, tokens, **NEVER_ENDS)) for tokens in (4, 3)
        )
        figures["operators"], figures["launches"] = longer.total - shorter.total, longer.launches - shorter.launches
    return {"first_token": prefill, "step": steps}, figures


def _peak_bytes(model: nn.Module, prompt: Callable[[], Any]) -> int:
    """What the GPU's allocator noted since its peak was reset; on a CPU, what tensors of one more prompt hold."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return weight_bytes(model) + peak_new_bytes(prompt)

"""What one decode step is made of: kernels inside a layer and outside, and its time beside that of its matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import sparsemm
from sparsemm.bench.cells import Times, ratio_of, take_turns
from sparsemm.bench.kernel_calls import CALLS, ONE_TOKEN, Workspace
from sparsemm.bench.measure import NEVER_ENDS
from sparsemm.bench.operators import count_operators
from sparsemm.bench.shapes import AttentionShape, prompt_inputs
from sparsemm.decoding import DecodeLoop
from sparsemm.patching import active_patch

LANGUAGE_MODELS = ("llama", "qwen2", "qwen3")
"""Plain, with biases, with norms of queries and keys."""

SMALL = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
MIDDLE = dict(
    **dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16),
    **dict(num_key_value_heads=16, vocab_size=32000),
)
_WARMUP = 3


def language_model(name: str, dtype: torch.dtype, **sizes: Any) -> nn.Module:
    """A language model of transformers' type `name` with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def prepared_loop(model: nn.Module, prompt_tokens: int, steps: int) -> DecodeLoop:
    """A loop over a patched model whose cache holds a prompt, and whose step can be called `steps` times."""
    loop = DecodeLoop(active_patch(model), reserve=steps + 2)
    loop.generate(**prompt_inputs(model, prompt_tokens), max_new_tokens=2, do_sample=False, **NEVER_ENDS)
    loop.cache.begin_steps()
    loop.step.prepare(steps)
    return loop


def step_kernels(
    build: Callable[[int], nn.Module], *, merged: bool = False, prompt_tokens: int = 40
) -> dict[str, float]:
    """Kernels of one step `inside` each layer and `outside` them all, views and allocations aside, from the counts of
    `build(num_layers)` at two depths; with projections `merged` or not."""
    counts = {}
    config = sparsemm.CompressionConfig("snapkv", 12, window_size=8)
    for num_layers in (2, 4):
        model = build(num_layers)
        with sparsemm.patch(model, config, merge_projections=merged):
            counts[num_layers] = count_operators(prepared_loop(model, prompt_tokens, 1).step).launches
    inside = (counts[4] - counts[2]) / 2
    return {"inside": inside, "outside": counts[2] - 2 * inside}


def kernel_counts() -> dict[str, Any]:
    """By language model and dtype, and with merged projections."""
    counts = {}
    for name in LANGUAGE_MODELS:
        for dtype in (torch.float32, torch.bfloat16):

            def build(num_layers: int, name: str = name, dtype: torch.dtype = dtype) -> nn.Module:
                return language_model(name, dtype, **SMALL, num_hidden_layers=num_layers)

            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            counts[label] = step_kernels(build)
            counts[f"{label}, merged"] = step_kernels(build, merged=True)
    return counts


def operator_costs(
    dtype: torch.dtype, *, batches: tuple[int, ...] = (1, 16), repeats: int = 15, calls: int = 10
) -> tuple[Times, dict[str, Any]]:
    """Seconds of `calls` calls of each operator around attention, at the middle size, and of PyTorch's way, taking
    turns; and how many times as long PyTorch takes, by operator and batch."""
    heads, kv_heads = MIDDLE["num_attention_heads"], MIDDLE["num_key_value_heads"]
    shape = AttentionShape(1, heads, kv_heads, MIDDLE["hidden_size"] // heads)
    times: Times = {}
    ratios = {}
    for batch in batches:
        slack = 2 * (repeats + 1) * calls  # both ways append
        counts = [64] * (batch * kv_heads)
        work = Workspace(shape, batch, 64, counts, torch.device("cpu"), dtype, slack, MIDDLE["intermediate_size"])
        for name in ONE_TOKEN:
            ways = {way: partial(_several, run, calls) for way, run in CALLS[name](work)[0].items()}
            found = take_turns(ways, repeats, work.device)
            times |= {f"{name}, batch {batch}, {way}": seconds for way, seconds in found.items()}
            ratios[f"{name}, batch {batch}"] = ratio_of(found, "pytorch", "sparsemm")
    return times, ratios


def _several(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


def middle_size(
    dtype: torch.dtype, *, prompt_tokens: int, budget: int, repeats: int = 30, threads: int = 2
) -> tuple[Times, dict[str, Any]]:
    """Seconds of a step of a middle-sized model, of its matrix products alone, and of transformers' step over the full
    cache, taking turns; and the ratios of medians within a round."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = language_model("llama", dtype, **MIDDLE, max_position_embeddings=prompt_tokens + 1024)
        full = model(**prompt_inputs(model, prompt_tokens), use_cache=True, logits_to_keep=1).past_key_values
        token = torch.zeros(1, 1, dtype=torch.long)

        def stock() -> None:
            model(input_ids=token, past_key_values=full, use_cache=True)
            full.crop(-1)

        products = [
            (part.weight, torch.randn(1, part.in_features, dtype=dtype))
            for part in model.modules()
            if isinstance(part, nn.Linear)
        ]

        def matrices() -> None:
            for weight, states in products:
                nn.functional.linear(states, weight)

        with sparsemm.patch(model, sparsemm.CompressionConfig("snapkv", budget)):
            step = prepared_loop(model, prompt_tokens, repeats + _WARMUP).step
        # Fused layers need no patch any more, so that transformers' step can take its turns among theirs.
        ways = {"step": step, "matrices": matrices, "stock": stock}
        times = take_turns(ways, repeats, model.device, warmup=_WARMUP)
    finally:
        torch.set_num_threads(before)
    return times, {
        "over_matrices": ratio_of(times, "step", "matrices"),
        "over_stock": ratio_of(times, "step", "stock"),
        "threads": threads,
    }

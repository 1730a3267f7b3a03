"""Time and memory of one prompt and its decode steps, under one method."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparsemm
from sparsemm.bench.baselines import CopyingLoop, kvpress_snapkv
from sparsemm.bench.memory import peak_new_bytes
from sparsemm.bench.operators import count_kernels, count_operators
from sparsemm.decoding import DecodeLoop
from sparsemm.decoding.generation import stock_greedy
from sparsemm.models import family_of

BASELINES = ("hf", "kvpress", "original")
"""`hf`: `model.generate` with the full cache; `kvpress`: its SnapKV, by `model.generate`; `original`: SparseMM's rows,
all of them copied at every token. Every other name is a method of this package."""


@dataclass
class Measurement:
    """Of one workload; seconds and bytes.

    Attributes:
        prefill: From the call to the first token, vision tower included; one value a repetition.
        steps: Of each decode step, whole batch.
        cache_bytes: Held at the end; None where the cache is not ours to ask.
        full_cache_bytes: Keys and values of every token at the end.
        effective_budget: Prompt rows kept per kv head.
        graph: Whether steps were replayed from a CUDA graph.
        peak_bytes: Largest allocation, weights included: of the whole run on a GPU, of the prompt's tensors on a CPU.
        operators, launches: Dispatched in one step; the second without views.
        kernels: Run on the GPU in one step; None on a CPU.
    """

    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    full_cache_bytes: int = 0
    effective_budget: float | None = None
    graph: bool = False
    peak_bytes: int = 0
    operators: int | None = None
    launches: int | None = None
    kernels: int | None = None

    @property
    def ms_per_token(self) -> float:
        return 1000 * statistics.median(self.steps)


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
) -> Measurement:
    """Time `steps` decode steps behind `warmup` others, and the prompt `repeats` times, greedily and to full length."""
    result = Measurement()
    prompt_tokens, new_tokens = inputs["input_ids"].shape[1], warmup + steps + 1
    release_memory(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    if method in ("hf", "kvpress"):
        run, press = _measure_stock, nullcontext()
        if method == "kvpress":
            press = kvpress_snapkv(model, config.budget, config.window_size, prompt_tokens)
        with press:
            run(model, inputs, new_tokens, repeats, result)
    else:
        with sparsemm.patch(model, config, decode_backend=decode_backend) as handle:
            _measure_ours(model, inputs, method, handle, new_tokens, repeats, graph, result)
    result.steps = result.steps[warmup:]
    result.full_cache_bytes = full_cache_bytes(model, inputs["input_ids"].shape[0], prompt_tokens + new_tokens - 1)
    return result


def _measure_ours(
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: str,
    handle: sparsemm.PatchHandle,
    new_tokens: int,
    repeats: int,
    graph: bool | None,
    result: Measurement,
) -> None:
    if method == "original":
        loop: DecodeLoop = CopyingLoop(handle, graph=False, time_steps=True)
    else:
        loop = DecodeLoop(handle, graph=graph, time_steps=True, reserve=new_tokens + SPARE_ROWS)

    def generate(tokens: int) -> None:
        model.generate(**inputs, **_greedy_to_the_end(tokens), custom_generate=loop, pad_token_id=0)

    for repeat in range(repeats):
        generate(new_tokens if repeat == repeats - 1 else 1)
        result.prefill.append(loop.prefill_seconds)
    result.steps = loop.step_seconds
    result.graph = loop.runner.captures > 0
    stats = loop.cache.record.stats()
    result.cache_bytes, result.effective_budget = loop.cache.memory_bytes(), stats.effective_budget
    if method != "original":
        loop.cache.begin_steps()
        count = count_operators(loop.step)
        result.operators, result.launches = count.total, count.launches
        result.kernels = count_kernels(loop.step, model.device)
    result.peak_bytes = _peak_bytes(model, lambda: generate(1))


SPARE_ROWS = 8  # for the steps that count operators


def _measure_stock(
    model: nn.Module, inputs: dict[str, Tensor], new_tokens: int, repeats: int, result: Measurement
) -> None:
    never = {"eos_token_id": None, "pad_token_id": 0}
    for repeat in range(repeats):
        _, (prefill, *steps) = stock_greedy(model, inputs, new_tokens if repeat == repeats - 1 else 1, **never)
        result.prefill.append(prefill)
    result.steps = steps
    result.peak_bytes = _peak_bytes(model, lambda: stock_greedy(model, inputs, 1, **never))
    short = {name: inputs[name][:, -8:] for name in ("input_ids", "attention_mask")}

    def count(tokens: int) -> Any:
        return count_operators(lambda: stock_greedy(model, short, tokens, **never))

    if not bool((short["input_ids"] == model.config.image_token_id).any()):  # one step more is one step
        longer, shorter = count(4), count(3)
        result.operators, result.launches = longer.total - shorter.total, longer.launches - shorter.launches


def _greedy_to_the_end(new_tokens: int) -> dict[str, Any]:
    unset = dict.fromkeys(("temperature", "top_p", "top_k", "eos_token_id"))
    return {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, **unset}


# -- bytes ------------------------------------------------------------------------------------------------------------


def release_memory(device: torch.device) -> None:
    """Give back what finished runs held on a GPU; a CPU's peak is not measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _peak_bytes(model: nn.Module, prompt: Callable[[], Any]) -> int:
    """What the GPU's allocator noted since its peak was reset; on a CPU, what tensors of one more prompt hold."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return weight_bytes(model) + peak_new_bytes(prompt)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def step_weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step has to read: decoder layers, norm and output matrix, not the embedding."""
    text_model, head = family_of(model).text_model(model), model.get_output_embeddings()
    parts = (text_model.layers, text_model.norm, head)
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())


def row_bytes(model: nn.Module) -> int:
    """Bytes of the key and value rows of one token in all layers."""
    text = model.config.get_text_config()
    head_dim = family_of(model).text_model(model).layers[0].self_attn.head_dim
    return 2 * head_dim * text.num_key_value_heads * text.num_hidden_layers * model.dtype.itemsize


def full_cache_bytes(model: nn.Module, batch: int, tokens: int) -> int:
    return batch * tokens * row_bytes(model)


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second of a large copy, read and write both counted; the best of ten."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - start
        best = min(best, seconds)
    return 2 * size / best

"""Time and memory of one prompt and its decode steps, under one method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import sparsemm
from sparsemm.bench.baselines import CopyingLoop, kvpress_snapkv
from sparsemm.bench.cells import Tell, Times, release_memory
from sparsemm.bench.memory import peak_new_bytes, row_bytes, weight_bytes
from sparsemm.bench.operators import count_kernels, count_operators
from sparsemm.bench.sent import sent_bytes, step_bytes
from sparsemm.bench.shapes import prompt_inputs
from sparsemm.decoding import DecodeLoop
from sparsemm.decoding.generation import stock_greedy
from sparsemm.models.parallel import tensor_parallel_of

SPARE_ROWS = 8  # for the steps that count operators and what is sent
SHORT_PROMPT = 64  # of the warm-up
PROMPT_RUNS, PROMPT_SECONDS = 4, 10.0  # a prompt is run so often, unless that takes longer
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
    graph: bool | None = None,
    decode_backend: str = "auto",
    tell: Tell = lambda text: None,
) -> tuple[Times, Figures]:
    """Time the prompt several times and `steps` decode steps behind `warmup` others, greedily and to full length.

    A short prompt goes before, which pays for set-up; of several runs of the prompt the first warms up too.

    Returns:
        Seconds `first_token`, from the call, vision tower included, one value a run; and `step`, of each decode step of
        the whole batch. And:

        - `cache_bytes`: held at the end; None where the cache is not ours to ask. `full_cache_bytes`: keys and values
          of every token at the end. `effective_budget`: prompt rows kept per kv head.
        - `cache_bytes_by_rank`, `sent_bytes` and `sent_formula` (`sparsemm.bench.sent`) of a model that processes hold
          together; all other bytes are then those of this process.
        - `peak_bytes`: largest allocation, weights included: of the whole run on a GPU, of the prompt's tensors on a
          CPU.
        - `graph`: whether steps were replayed from a CUDA graph.
        - `operators` and `launches` dispatched in one step, the second without views; `kernels` that the GPU ran in
          one, None on a CPU.
    """
    batch, prompt_tokens = inputs["input_ids"].shape
    new_tokens = warmup + steps + 1
    short = prompt_inputs(model, min(SHORT_PROMPT, prompt_tokens), batch)
    release_memory(model.device)
    if method in ("hf", "kvpress"):
        press = nullcontext()
        if method == "kvpress":
            press = kvpress_snapkv(model, config.budget, config.window_size, prompt_tokens)
        with press:
            times, figures = _measure_stock(model, inputs, short, new_tokens, tell)
    else:
        with sparsemm.patch(model, config, decode_backend=decode_backend) as handle:
            options = {"time_steps": True, "streamer": _ticks(model.device, new_tokens, tell)}
            if method == "original":
                loop: DecodeLoop = CopyingLoop(handle, graph=False, **options)
            else:
                loop = DecodeLoop(handle, graph=graph, reserve=new_tokens + SPARE_ROWS, **options)
            times, figures = _measure_ours(model, inputs, short, loop, new_tokens, tell)
    times["step"] = times["step"][warmup:]
    unknown = dict.fromkeys(("cache_bytes", "effective_budget", "operators", "launches", "kernels"))
    full = batch * (prompt_tokens + new_tokens - 1) * row_bytes(model)
    return times, {**unknown, "graph": False, "full_cache_bytes": full, **figures}


class _Ticks(BaseStreamer):
    """Tells of every token."""

    def __init__(self, total: int, tell: Tell) -> None:
        self.total, self.tell, self.seen = total, tell, 0

    def put(self, value: Tensor) -> None:
        self.seen += 1
        self.tell(f"token {self.seen} of {self.total}")

    def end(self) -> None:
        self.seen = 0


def _ticks(device: torch.device, total: int, tell: Tell) -> _Ticks | None:
    """None on a GPU: its steps are too short to be followed, and a streamer takes tokens off the device."""
    return None if device.type == "cuda" else _Ticks(total, tell)


def _first_tokens(
    run: Callable[[int], float], new_tokens: int, model: nn.Module, tell: Tell
) -> tuple[list[float], int]:
    """Seconds to the first token: of a few runs that end there, while they are short, and of the one that decodes. And
    the most bytes: of the decoding run, as the GPU's allocator notes them; on a CPU those of the first run's tensors,
    the watching of which costs nothing beside a prompt that is run no more than twice."""
    parallel, device, on_gpu = tensor_parallel_of(model), model.device, model.device.type == "cuda"
    seconds: list[float] = []
    peak = weight_bytes(model)
    while len(seconds) < PROMPT_RUNS and parallel.collect(sum(seconds))[0] < PROMPT_SECONDS:
        tell(f"prompt, run {len(seconds) + 1}")
        if seconds or on_gpu:
            seconds.append(run(1))
        else:
            peak += peak_new_bytes(lambda: seconds.append(run(1)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds.append(run(new_tokens))
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
    return (seconds[1:] if len(seconds) > 2 else seconds), peak


def _measure_ours(
    model: nn.Module,
    inputs: dict[str, Tensor],
    short: dict[str, Tensor],
    loop: DecodeLoop,
    new_tokens: int,
    tell: Tell,
) -> tuple[Times, Figures]:
    def generate(tokens: int, inputs: dict[str, Tensor] = inputs) -> float:
        unset = dict.fromkeys(("temperature", "top_p", "top_k"))
        options = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, **NEVER_ENDS, **unset}
        loop.generate(**inputs, **options)
        return loop.prefill_seconds

    generate(3, short)
    first, peak = _first_tokens(generate, new_tokens, model, tell)
    times: Times = {"first_token": first, "step": loop.step_seconds}
    stats = loop.cache.record.stats()
    figures: Figures = {
        "peak_bytes": peak,
        "graph": loop.runner.captures > 0,
        "cache_bytes": loop.cache.memory_bytes(),
        "effective_budget": stats.effective_budget,
    }
    parallel = loop.cache.plan.parallel
    if parallel.size > 1:
        loop.cache.begin_steps()
        sent = {
            "sent_bytes": sent_bytes(loop.step),
            "sent_formula": step_bytes(model, len(inputs["input_ids"]), parallel.size),
        }
        figures |= {"cache_bytes_by_rank": stats.bytes_by_rank, **sent}
    if not isinstance(loop, CopyingLoop):
        loop.cache.begin_steps()
        count = count_operators(loop.step)
        figures |= {"operators": count.total, "launches": count.launches}
        figures["kernels"] = count_kernels(loop.step, model.device)
    return times, figures


def _measure_stock(
    model: nn.Module, inputs: dict[str, Tensor], short: dict[str, Tensor], new_tokens: int, tell: Tell
) -> tuple[Times, Figures]:
    streamer = _ticks(model.device, new_tokens, tell)
    times: Times = {}

    def generate(tokens: int) -> float:
        _, (first, *times["step"]) = stock_greedy(model, inputs, tokens, streamer=streamer, **NEVER_ENDS)
        return first

    stock_greedy(model, short, 3, **NEVER_ENDS)
    times["first_token"], peak = _first_tokens(generate, new_tokens, model, tell)
    figures: Figures = {"peak_bytes": peak}
    text = {name: inputs[name][:, -8:] for name in ("input_ids", "attention_mask")}
    if not bool((text["input_ids"] == model.config.image_token_id).any()):  # one step more is one step
        longer, shorter = (
            count_operators(lambda tokens=tokens: stock_greedy(model, text, tokens, **NEVER_ENDS)) for tokens in (4, 3)
        )
        figures["operators"], figures["launches"] = longer.total - shorter.total, longer.launches - shorter.launches
    return times, figures

"""The largest batch whose caches fit, and the tokens a second it decodes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparsemm
from sparsemm.bench.cells import Times, release_memory, take_turns
from sparsemm.bench.measure import NEVER_ENDS
from sparsemm.bench.memory import weight_bytes
from sparsemm.decoding import DecodeLoop, DecodeStep, StepRunner, why_no_graph
from sparsemm.decoding.graph import CudaGraphs
from sparsemm.errors import ConfigError

logger = logging.getLogger(__name__)

_HEADROOM = 0.9  # of the memory beside the weights; the rest is for activations and fragments
_ATTEMPTS = 5


def largest_batch(
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: str,
    config: sparsemm.CompressionConfig,
    *,
    steps: int,
    limit_bytes: int,
    decode_backend: str = "auto",
    max_batch: int = 2048,
) -> tuple[Times, dict[str, Any]]:
    """Decode as many copies of one prompt as fit into `limit_bytes` beside the weights.

    The prompt goes through the model once and its cache is then repeated: prompts of a batch can be processed one at a
    time, so that decoding, not the prompt's activations, bounds the batch. The speed does not depend on what is cached.

    Args:
        inputs: One prompt.
        method: `hf` for transformers' own full cache, else a method of this package.
        limit_bytes: Memory for weights, caches and the rest.

    Returns:
        Seconds of each `step` of all sequences; `largest_batch`, `tokens_per_second` of all of them,
        `bytes_per_sequence` of cache.

    Raises:
        ConfigError: Not even one fits.
    """
    prepare = _prepare_stock if method == "hf" else _prepare_ours
    room = _HEADROOM * (limit_bytes - weight_bytes(model))
    with sparsemm.patch(model, config, decode_backend=decode_backend) as handle:
        if method == "hf":
            handle.remove()
        per_sequence, step = prepare(model, handle, inputs, 1, steps)
        batch = min(max_batch, int(room // per_sequence))
        for _ in range(_ATTEMPTS):
            if batch < 1:
                break
            step = None
            release_memory(model.device)
            try:
                _, step = prepare(model, handle, inputs, batch, steps)
                # The first two warm up and capture.
                seconds = take_turns({"step": step}, steps, model.device, warmup=2)
            except torch.cuda.OutOfMemoryError:
                logger.info("%s: a batch of %d does not fit", method, batch)
                batch = int(0.85 * batch)
            else:
                speed = batch / statistics.median(seconds["step"])
                figures = {"largest_batch": batch, "tokens_per_second": speed, "bytes_per_sequence": per_sequence}
                return seconds, figures
    raise ConfigError("does not fit")


def _prepare_ours(
    model: nn.Module, handle: sparsemm.PatchHandle, inputs: dict[str, Tensor], batch: int, steps: int
) -> tuple[int, Callable[[], None]]:
    """Cache bytes of the batch and its decode step."""
    loop = DecodeLoop(handle, reserve=steps + 4)
    loop.generate(**inputs, max_new_tokens=1, do_sample=False, **NEVER_ENDS)
    cache = loop.cache
    cache.batch_repeat_interleave(batch)
    logits = loop.step.logits.expand(batch, -1)
    step = DecodeStep(model, cache, loop.step.positions - 1, logits)
    obstacle = why_no_graph(handle.text_model, handle.plan.decode_backend)
    graphs = CudaGraphs(model.device) if obstacle is None else None

    def body() -> None:
        step.token.copy_(step.logits.argmax(-1, keepdim=True))
        step()

    return cache.memory_bytes(), StepRunner(body, cache, graphs)


def _prepare_stock(
    model: nn.Module, handle: Any, inputs: dict[str, Tensor], batch: int, steps: int
) -> tuple[int, Callable[[], None]]:
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **NEVER_ENDS)
    cache = output.past_key_values
    cache.batch_repeat_interleave(batch)
    token = output.sequences[:, -1:].repeat(batch, 1)

    @torch.no_grad()
    def step() -> None:
        nonlocal token
        positions = torch.full((batch, 1), cache.get_seq_length(), device=token.device)
        logits = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)

    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    # transformers concatenates at every token: one layer is there twice.
    return held + held // len(cache.layers), step

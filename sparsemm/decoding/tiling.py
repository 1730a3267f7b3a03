"""Long prompts in less memory: what works on each token by itself runs in tiles over the sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.models.instances import forward_name, set_on_instance

PROMPT_TILE = 2048
"""Tokens at a time: enough for full matrix throughput, and 1/16 of the MLP's activations of a 32K prompt."""

_TOKEN_BY_TOKEN = ("norm", "mlp", "feed_forward", "feedforward", "moe")  # in the names of a decoder layer's parts


@contextmanager
def tiled_prompt(text_model: nn.Module, tile: int = PROMPT_TILE) -> Iterator[None]:
    """Run norms and feed-forward parts of the decoder layers over `tile` tokens at a time while the context lasts.

    The MLP's intermediate activations and the norms' float32 copies are the largest tensors of a long prompt once
    attention holds no matrix. (Norms of queries and keys are tiled with their rotation, see `Projections.project`.)
    Results agree within float error (matrix products of other heights round differently). Only instances are touched,
    and put back at the end. `tile=0` changes nothing.
    """
    with ExitStack() as stack:
        if tile > 0:
            for layer in text_model.layers:
                for part, module in layer.named_children():
                    if any(name in part for name in _TOKEN_BY_TOKEN):
                        stack.enter_context(_tiled(module, tile))
            stack.enter_context(_tiled(text_model.norm, tile))
        yield


@contextmanager
def _tiled(module: nn.Module, tile: int) -> Iterator[None]:
    """A forward from `[batch, seq_len, size]` to the same shape, in tiles; all at once where it is another."""
    name = forward_name(module)
    original = getattr(module, name)

    @functools.wraps(original)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3 or hidden_states.shape[1] <= tile or args or kwargs or torch.is_grad_enabled():
            return original(hidden_states, *args, **kwargs)
        out = None
        for begin in range(0, hidden_states.shape[1], tile):
            part = hidden_states[:, begin : begin + tile].contiguous()
            done = original(part)
            if not isinstance(done, Tensor) or done.shape != part.shape:
                return original(hidden_states)
            out = done.new_empty(hidden_states.shape) if out is None else out
            out[:, begin : begin + tile] = done
        return out

    undo = set_on_instance(module, name, forward)
    try:
        yield
    finally:
        undo()

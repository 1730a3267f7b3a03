"""Long prompts in less memory: what works on each token by itself runs in tiles over the sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparsemm.models.instances import forward_name, set_on_instance

PROMPT_TILE = 2048
"""Tokens at a time: enough for full matrix throughput, and 1/16 of the MLP's activations of a 32K prompt."""


@contextmanager
def tiled_prompt(text_model: nn.Module, tile: int = PROMPT_TILE) -> Iterator[None]:
    """Run MLPs and norms of the decoder layers over `tile` tokens at a time while the context lasts.

    The MLP's intermediate activations and the norms' float32 copies are the largest tensors of a long prompt once
    attention holds no matrix. Results agree within float error (matrix products of other heights round differently).
    Only instances are touched, and put back at the end. `tile=0` changes nothing.
    """
    with ExitStack() as stack:
        if tile > 0:
            for layer in text_model.layers:
                for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    stack.enter_context(_tiled(module, tile))
            stack.enter_context(_tiled(text_model.norm, tile))
        yield


@contextmanager
def _tiled(module: nn.Module, tile: int) -> Iterator[None]:
    """A forward from `[batch, seq_len, size]` to the same shape, in tiles."""
    name = forward_name(module)
    original = getattr(module, name)

    @functools.wraps(original)
    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[1] <= tile or torch.is_grad_enabled():
            return original(hidden_states)
        out = torch.empty_like(hidden_states)
        for begin in range(0, hidden_states.shape[1], tile):
            out[:, begin : begin + tile] = original(hidden_states[:, begin : begin + tile])
        return out

    undo = set_on_instance(module, name, forward)
    try:
        yield
    finally:
        undo()

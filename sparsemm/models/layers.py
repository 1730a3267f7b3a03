"""The decoder layers of a language model: which keep ragged rows, and what each is handed."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def sliding_windows(text_config: PretrainedConfig) -> tuple[int | None, ...]:
    """Of each decoder layer, the window of one that slides beside layers that attend to everything; None for these.

    Sliding layers hold a window's tokens whatever the prompt, so there is nothing to compress: they keep transformers'
    attention and cache. Where all layers slide, none is named.
    """
    layer_types = getattr(text_config, "layer_types", None) or ()
    window = getattr(text_config, "sliding_window", None)
    if window is None or "full_attention" not in layer_types:
        return (None,) * text_config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def ragged_layers(text_config: PretrainedConfig) -> list[int]:
    """Indices of the decoder layers that keep ragged rows, the layers that plans, head scores and statistics count."""
    return [index for index, window in enumerate(sliding_windows(text_config)) if window is None]


def rotary_embeddings(text_model: nn.Module, hidden_states: Tensor, position_ids: Tensor) -> list[Any]:
    """cos and sin of the columns for each decoder layer, the same or one for each of `config.layer_types`."""
    rotary_emb, layers = text_model.rotary_emb, text_model.layers
    if "layer_type" not in inspect.signature(rotary_emb.forward).parameters:
        return [rotary_emb(hidden_states, position_ids)] * len(layers)
    kinds = text_model.config.layer_types
    made = {kind: rotary_emb(hidden_states, position_ids, kind) for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def mean_rotation(text_model: nn.Module, last: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin of the `count` positions behind a prompt in the layers that keep ragged rows, averaged over them:
    float32 `[..., batch, 1, size]`. None without rotary embedding.

    `last`: The largest position of each sequence, `[batch, 1]`, or `[3 or 4, batch, 1]` where there are three axes (and
    one that counts tokens): behind the prompt all of them go on from the largest.
    """
    rotary_emb = getattr(text_model, "rotary_emb", None)
    if rotary_emb is None:
        return None
    if last.dim() == 3:
        last = last[-3:].amax(0, keepdim=True).expand(3, -1, -1)
    positions = last + 1 + torch.arange(count, device=last.device)
    kind = ("full_attention",) if "layer_type" in inspect.signature(rotary_emb.forward).parameters else ()
    # A copy: some embeddings widen their frequencies for the positions they are asked about, and keep them.
    cos, sin = copy.deepcopy(rotary_emb)(torch.zeros(1, device=last.device), positions, *kind)
    return cos.mean(-2, keepdim=True), sin.mean(-2, keepdim=True)

"""Forwards that break off, and forwards by hand."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sparsemm.models import family_of


@contextlib.contextmanager
def broken_off(module, kind=RuntimeError, after=0):
    """`module` raises at its `after + 1`-th forward, which the block must not survive."""
    calls = []

    def raising(*_):
        calls.append(None)
        if len(calls) > after:
            raise kind("broken off")

    hook = module.register_forward_pre_hook(raising)
    try:
        with pytest.raises(kind, match="broken off"):
            yield
    finally:
        hook.remove()


def places(model, layer):
    """Before a layer's rows are stored, behind that, and behind all layers."""
    text_model = family_of(model).text_model(model)
    return [text_model.layers[layer].self_attn, text_model.layers[layer].mlp, text_model.norm]


def feed(model, cache, tokens, mask=None):
    seen = cache.get_seq_length()
    mask = torch.ones(len(tokens), seen + len(tokens[0]), dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(1) - 1)[:, seen:].clamp(min=0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens), attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits

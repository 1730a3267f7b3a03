"""The evicting cache equals a full-size cache whose dropped positions are masked out.

The twin is transformers' unpatched model with a plain attention function that keeps every key, chooses the dropped
positions once with the float64 reference, and masks them for every later query.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from greedy_runs import assert_close, config, greedy, scores, text_inputs
from reference import kept_positions
from toy_models import FAMILIES, toy_inputs, toy_model
from transformers import AttentionInterface

import sparsemm

MARGIN = 1e-5


class MaskedTwin:
    """An attention function for one generation of batch 1."""

    def __init__(self, settings, table, num_layers):
        self.settings, self.table, self.num_layers = settings, table, num_layers
        self.dropped, self.kept, self.margin = {}, {}, np.inf

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        layer_idx, prompt = module.layer_idx, query.shape[2]
        if layer_idx not in self.dropped:
            self._choose(layer_idx, query[0], key[0], scaling)
            dropped = None
        else:
            dropped = self.dropped[layer_idx]
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(2, 3) * scaling
        columns = torch.arange(key.shape[2])
        future = columns > (key.shape[2] - prompt + torch.arange(prompt))[:, None]
        logits = logits.masked_fill(future, float("-inf"))
        if dropped is not None:
            hidden = torch.nn.functional.pad(dropped, (0, key.shape[2] - dropped.shape[1]))
            logits = logits.masked_fill(hidden.repeat_interleave(group, 0)[:, None], float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def _choose(self, layer_idx, query, key, scaling):
        settings = self.settings
        kept = kept_positions(
            query.double().numpy(),
            key.double().numpy(),
            method=settings.method,
            budget=settings.budget,
            window=settings.window_size,
            kernel=settings.kernel_size,
            rounding=settings.rounding,
            layer_idx=layer_idx,
            num_layers=self.num_layers,
            scores=self.table,
            ratio=settings.ratio,
            scaling=scaling,
        )
        self.margin = min(self.margin, kept.margin)
        self.kept[layer_idx] = [len(positions) for positions in kept.positions]
        dropped = torch.ones(key.shape[:2], dtype=torch.bool)
        for head, positions in enumerate(kept.positions):
            dropped[head, positions] = False
        self.dropped[layer_idx] = dropped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv", "sparsemm", "random"])
@pytest.mark.parametrize("rounding", ["exact", "paper"])
def test_same_logits_as_the_masked_full_cache(family, method, rounding):
    model = toy_model(family, num_layers=3)
    inputs = text_inputs(70) if family == "llava-vicuna" else toy_inputs(model, 1, seed=1)
    table = scores(model)
    settings = config(method, 14, head_scores=table if method == "sparsemm" else None, rounding=rounding)
    with sparsemm.patch(model, settings) as handle:
        ids, logits, _ = greedy(model, inputs, tokens=8)
        kept = handle.stats.kept_rows[0]
        used = handle.plan.head_scores
    twin = MaskedTwin(settings, None if used is None else np.asarray(used.values, dtype=np.float64), 3)
    AttentionInterface.register("masked_twin", twin)
    model.set_attn_implementation({"text_config": "masked_twin"})
    expected_ids, expected, _ = greedy(model, inputs, tokens=8)
    assert twin.margin >= MARGIN, "choose another seed: the reference cannot tell which rows to keep"
    assert kept.tolist() == [twin.kept[layer] for layer in range(3)]
    assert any(dropped.any() for dropped in twin.dropped.values())
    assert torch.equal(ids, expected_ids)
    assert_close(logits, expected)

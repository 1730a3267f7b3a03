"""The evicting cache equals a full-size cache whose dropped positions are masked out.

The twin is transformers' unpatched model with a plain attention function that keeps every key, chooses the dropped
positions once with the float64 reference, and masks them for every later query.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from baselines import BaselineTwin
from greedy_runs import assert_close, calibration, config, greedy, scores, text_inputs
from masked_twin import MARGIN, MaskedTwin, attend_by
from toy_models import FAMILIES, IMAGE_ID, toy_inputs, toy_model

import sparsemm
from sparsemm.methods import METHODS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "rounding"),
    [
        *itertools.product(["snapkv", "pyramidkv", "adakv", "sparsemm", "random"], ["exact", "paper"]),
        ("rate_distortion", "exact"),
    ],
)
def test_same_logits_as_the_masked_full_cache(family, method, rounding):
    model = toy_model(family, num_layers=3)
    inputs = text_inputs(70) if family == "llava-vicuna" else toy_inputs(model, 1, seed=1)
    table = {"sparsemm": scores, "rate_distortion": calibration}.get(method, lambda model: None)(model)
    settings = config(method, 14, head_scores=table, rounding=rounding)
    with sparsemm.patch(model, settings) as handle:
        ids, logits, _ = greedy(model, inputs, tokens=8)
        kept = handle.stats.kept_rows[0]
        used = handle.plan.head_scores
    twin = MaskedTwin(settings, used, 3)
    attend_by(twin, model)
    expected_ids, expected, _ = greedy(model, inputs, tokens=8)
    assert twin.margin >= MARGIN, "choose another seed: the reference cannot tell which rows to keep"
    assert kept.tolist() == [twin.kept[layer] for layer in range(3)]
    assert any(dropped.any() for dropped in twin.dropped.values())
    assert torch.equal(ids, expected_ids)
    assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["expected_attention", "vl_cache", "mixkv", "head_kv", "rate_distortion_mixkv"])
def test_methods_that_see_more_than_keys_equal_it_too(family, method):
    """Image and text: values, queries before their rotation, tokens behind the image, what other layers say."""
    model = toy_model(family, num_layers=3)
    inputs = toy_inputs(model, 1, [12], seed=1)
    table = calibration(model) if METHODS[method].needs_calibration else None
    settings = config(method, 14, head_scores=table)
    with sparsemm.patch(model, settings) as handle:
        ids, logits, _ = greedy(model, inputs, tokens=8)
        kept = handle.stats.kept_rows[0]
        tiled = sparsemm.generate(model, inputs, max_new_tokens=8, do_sample=False, prompt_tile=7)
        assert torch.equal(tiled.new_tokens, ids) and torch.equal(tiled.stats.kept_rows[0], kept)
    image = (inputs["input_ids"][0] == IMAGE_ID).numpy()
    twin = BaselineTwin(model, settings, image, None if table is None else table.curves)
    attend_by(twin, model)
    expected_ids, expected, _ = greedy(model, inputs, tokens=8)
    assert twin.margin >= MARGIN, "choose another seed: the reference cannot tell which rows to keep"
    assert kept.tolist() == [[len(positions) for positions in each.positions] for each in twin.kept]
    assert int(kept.sum()) == 14 * kept.numel()
    assert torch.equal(ids, expected_ids)
    assert_close(logits, expected)

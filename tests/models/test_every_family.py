"""Every family, on toys with their real processors: a full budget is the stock model, eviction a masked twin of it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from greedy_runs import assert_close, config, greedy, scores, without_heads
from masked_twin import MARGIN, MaskedTwin, attend_by
from PIL import Image
from toy_vlms import LANGUAGE_MODELS, TOYS, mistral3_inputs, toy_vlm

import sparsemm
from sparsemm.models import FAMILIES, family_of

EVERY = [*TOYS, "mistral3", *LANGUAGE_MODELS]
DECODE_TOLERANCE = 5e-6


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def inputs_of(name, model, processor, rows=3):
    """Two images, no image, one image; or text alone. Rows of different lengths, padded on the left."""
    if name == "mistral3":
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(3, *size, generator=generator) for size in ((56, 84), (42, 14), (28, 56))][:rows]
        return mistral3_inputs(images, ["Compare these.", "Hello?", "Read it now, please."][:rows])
    images = [[picture(40, 40), picture(70, 20)], None, [picture(30, 64)]][:rows] if name in TOYS else None
    prompts = ["Compare these.", "Hello?", "Read it now, please."][:rows]
    return dict(family_of(model).build_inputs(processor, images, prompts))


@functools.cache
def toy(name, attn_implementation="sdpa"):
    return toy_vlm(name, attn_implementation=attn_implementation)


def assert_stock(actual, expected):
    """Logits `[steps, batch, vocab]` of prompt and steps: the prompt's bit for bit."""
    assert torch.equal(actual[0], expected[0])
    limit = DECODE_TOLERANCE * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= limit


def test_every_family_has_a_toy():
    families = {family_of(toy(name)[0]).name for name in [*TOYS, "mistral3"]}
    assert families | {"llava_next", "qwen2_vl"} == set(FAMILIES)  # which have toys of their own


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EVERY)
def test_a_full_budget_is_the_stock_model(name, attn_implementation):
    model, processor = toy(name, attn_implementation)
    for rows in (3, 1):
        inputs = inputs_of(name, model, processor, rows)
        assert inputs["attention_mask"].all() == (rows == 1)
        ids, stock, cache = greedy(model, inputs)
        turn = next_turn(inputs, ids)
        turn_ids, stock_turn, _ = greedy(model, turn, past_key_values=cache)
        with sparsemm.patch(model, config("fullkv", None)):
            patched_ids, logits, cache = greedy(model, inputs)
            second_ids, second, _ = greedy(model, turn, past_key_values=cache)
            fast = sparsemm.generate(model, inputs, max_new_tokens=6, prompt_tile=16)
            exact = sparsemm.generate(model, inputs, max_new_tokens=6, exact_prompt=True)
            fast_turn = sparsemm.generate(model, turn, max_new_tokens=6, past_key_values=fast.cache)
        assert torch.equal(patched_ids, ids)
        assert torch.equal(fast.new_tokens, ids) and torch.equal(exact.new_tokens, ids)
        assert_stock(logits, stock)
        assert torch.equal(second_ids, turn_ids) and torch.equal(fast_turn.new_tokens, turn_ids)
        assert_close(second, stock_turn)
        assert torch.equal(greedy(model, inputs)[1], stock)


def next_turn(inputs, answer):
    """The conversation so far and four more tokens of text."""
    more = torch.tensor([[70, 71, 72, 73]]).expand(len(answer), -1)
    ones = torch.ones(len(answer), answer.shape[1] + 4, dtype=torch.long)
    return {
        "input_ids": torch.cat([inputs["input_ids"], answer, more], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1),
    }


@pytest.mark.parametrize("name", EVERY)
def test_eviction_is_a_masked_full_cache(name):
    model, processor = toy_vlm(name, seed=1)  # its attention is replaced: none of the shared ones
    single = inputs_of(name, model, processor, rows=1)
    table = scores(model)
    runs = []
    for method in ("snapkv", "pyramidkv", "adakv", "sparsemm", "random"):
        settings = config(method, 14, head_scores=table if method == "sparsemm" else None)
        with sparsemm.patch(model, settings) as handle:
            runs.append((settings, *greedy(model, single)[:2], handle.stats.kept_rows[0], handle.plan.head_scores))
            assert torch.equal(sparsemm.generate(model, single, max_new_tokens=6).new_tokens, runs[-1][1])
    for settings, ids, logits, kept, used in runs:
        twin = MaskedTwin(settings, used, 2)
        attend_by(twin, model)
        expected_ids, expected, _ = greedy(model, single)
        assert twin.margin >= MARGIN, "choose another seed: the reference cannot tell which rows to keep"
        assert kept.tolist() == [twin.kept[layer] for layer in range(2)]
        assert any(dropped.any() for dropped in twin.dropped.values())
        assert torch.equal(ids, expected_ids)
        assert_close(logits, expected)


@pytest.mark.parametrize("mode", ["zero_query", "zero_output"])
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "phi3", "gemma3"])
def test_masked_heads_equal_a_model_with_edited_weights(name, mode):
    """q/k norms; biases; one projection for query, key and value."""
    model, processor = toy(name)
    inputs = inputs_of(name, model, processor)
    table = scores(model)
    _, expected, _ = greedy(without_heads(model, table, 0.4, mode), inputs)
    with sparsemm.patch(model, config("mask", None, head_scores=table, mask_ratio=0.4, mask_mode=mode)):
        assert_close(greedy(model, inputs)[1], expected)

"""Layers with a sliding window beside ragged ones: transformers' own cache inside ours, whatever is done to it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from greedy_runs import assert_close, config, greedy, reachable_bytes, scores, text_inputs
from interruptions import broken_off, feed, places
from PIL import Image
from toy_vlms import toy_vlm
from transformers import DynamicCache

import sparsemm
from sparsemm.cache.sliding import SPARE
from sparsemm.errors import CacheError
from sparsemm.models import family_of

WINDOW = 12  # of the toys
KINDS = ["gemma3", "gemma3_text"]


@functools.cache
def toy(name="gemma3"):
    return toy_vlm(name)[0]


def padded(length, batch=2, padding=4):
    inputs = text_inputs(length, batch=batch)
    inputs["attention_mask"][0, :padding] = 0
    return inputs


def layers_of(model):
    return family_of(model).text_model(model).layers


def windows(cache):
    return [(layer.keys, layer.values, layer.seen) for layer in cache.layers if layer.is_sliding]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, 40])
def test_windows_that_fill_and_move_are_those_of_the_stock_model(name, length):
    model = toy(name)
    inputs = padded(length, padding=2)
    ids, stock, stock_cache = greedy(model, inputs, 20)
    with sparsemm.patch(model, config("fullkv", None)):
        ours, logits, cache = greedy(model, inputs, 20)
        fast = sparsemm.generate(model, inputs, max_new_tokens=20, min_new_tokens=20, reserve=3)
    assert torch.equal(ours, ids) and torch.equal(fast.new_tokens, ids)
    assert torch.equal(logits[0], stock[0])
    assert (logits - stock).abs().max() <= 5e-6 * max(1.0, float(stock.abs().max()))
    for mine, theirs in zip(cache.layers, stock_cache.layers, strict=True):
        assert mine.seen == theirs.get_seq_length() and mine.is_sliding == theirs.is_sliding
        if mine.is_sliding:
            assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
            assert mine.keys.shape[-2] <= WINDOW - 1 + SPARE
            torch.testing.assert_close(mine.keys[:, :, -(WINDOW - 1) :], theirs.keys, rtol=1e-4, atol=1e-4)


def test_figures_count_ragged_layers_only():
    model = toy()
    text = model.config.get_text_config()
    inputs = text_inputs(50)
    with sparsemm.patch(model, config("sparsemm", 16, head_scores=scores(model)), reserve=8) as handle:
        assert handle.plan.num_layers == 2 and handle.plan.sliding_windows == (WINDOW, None, WINDOW, None)
        cache = greedy(model, inputs)[2]
        stats = handle.stats
        assert stats.kept_rows.shape == (1, 2, text.num_key_value_heads)
        assert stats.effective_budget == 16 and stats.kept_rows.sum() == 16 * 2 * text.num_key_value_heads
        row = 2 * text.head_dim * 4  # key and value, float32
        assert stats.token_bytes == 2 * text.num_key_value_heads * row
        assert stats.full_cache_bytes == (50 + 5) * stats.token_bytes
        # Of a step's tensors one more column than is kept lies in memory.
        assert stats.sliding_bytes == 2 * text.num_key_value_heads * row * (WINDOW - 1 + SPARE + 1)
        assert cache.memory_bytes() == stats.cache_bytes + stats.sliding_bytes
        assert cache.memory_bytes() <= reachable_bytes(cache) <= cache.memory_bytes() + 64
        longer = greedy(model, text_inputs(400))[2]
        assert handle.stats.sliding_bytes == stats.sliding_bytes
        assert longer.memory_bytes() - cache.memory_bytes() < row * 400


def test_head_scores_are_of_the_ragged_layers():
    model = toy()
    with pytest.raises(sparsemm.SparseMMError, match=r"4 layers x 4 query heads, the model has 2 x 4"):
        sparsemm.patch(model, config("sparsemm", 16, head_scores=sparsemm.HeadScores(torch.ones(4, 4))))


@pytest.mark.parametrize("method", ["snapkv", "adakv", "sparsemm"])
def test_rows_of_a_batch_read_as_they_would_alone(method):
    model = toy()
    settings = config(method, 14, head_scores=scores(model) if method == "sparsemm" else None)
    inputs = padded(40, batch=3, padding=17)
    with sparsemm.patch(model, settings):
        together, logits, _ = greedy(model, inputs)
        for row in range(3):
            valid = inputs["attention_mask"][row].bool()
            alone = {name: value[row : row + 1, valid] for name, value in inputs.items()}
            ids, expected, _ = greedy(model, alone)
            assert torch.equal(together[row : row + 1], ids)
            assert_close(logits[:, row : row + 1], expected)


@pytest.mark.parametrize("width", [1, 3, SPARE + 1, 20])
@pytest.mark.parametrize("name", KINDS)
def test_a_turn_that_breaks_off_is_taken_back(name, width):
    model = toy(name)
    inputs = padded(30)
    turn = text_inputs(width, batch=2, seed=1)["input_ids"].tolist()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, width, dtype=torch.long)], dim=1)
    text_model = family_of(model).text_model(model)
    with sparsemm.patch(model, config("adakv", 12), reserve=1) as handle:
        cache = handle.new_cache()
        feed(model, cache, inputs["input_ids"].tolist(), inputs["attention_mask"])
        before = copy.deepcopy(cache)
        expected = feed(model, copy.deepcopy(cache), turn, mask)
        for place in [*(layer.self_attn for layer in text_model.layers), text_model.layers[2].mlp, text_model.norm]:
            with broken_off(place, KeyboardInterrupt):
                feed(model, cache, turn, mask)
            assert [layer.seen for layer in cache.layers] == [30] * 4
            # A step leaves a column less of those beyond the window.
            for mine, was in zip(windows(cache), windows(before), strict=True):
                assert torch.equal(mine[0][:, :, -(WINDOW - 1) :], was[0][:, :, -(WINDOW - 1) :])
        torch.testing.assert_close(feed(model, cache, turn, mask), expected, rtol=0, atol=0)


def test_a_prompt_that_breaks_off_leaves_an_empty_cache():
    model = toy()
    inputs = padded(30)
    with sparsemm.patch(model, config("snapkv", 12)) as handle, torch.no_grad():
        expected = model(**inputs, use_cache=True).logits
        cache = handle.new_cache()
        for place in places(model, 3):
            with broken_off(place):
                model(**inputs, past_key_values=cache)
            assert [layer.seen for layer in cache.layers] == [0] * 4 and cache.memory_bytes() == 0
        assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)


def test_a_step_that_breaks_off_can_be_gone_on_from():
    model = toy()
    inputs = padded(30)
    with sparsemm.patch(model, config("snapkv", 12)):
        whole = sparsemm.generate(model, inputs, max_new_tokens=9, min_new_tokens=9)
        cache = DynamicCache(config=model.config)
        with broken_off(layers_of(model)[2].self_attn, after=4):
            sparsemm.generate(model, inputs, max_new_tokens=9, min_new_tokens=9, past_key_values=cache)
        assert isinstance(cache, sparsemm.SparseCache) and cache.get_seq_length() == 33
        ids = whole.sequences[:, :34]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
        rest = sparsemm.generate(
            model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, max_new_tokens=5, min_new_tokens=5
        )
        assert torch.equal(rest.new_tokens, whole.new_tokens[:, 4:])


def test_columns_are_taken_back_as_far_as_the_windows_reach():
    model = toy()
    with sparsemm.patch(model, config("fullkv", None)) as handle:
        cache = handle.new_cache()
        feed(model, cache, text_inputs(9)["input_ids"].tolist())
        feed(model, cache, [[20, 21, 22]])
        cache.crop(-12)  # nothing had left a window yet
        assert cache.get_seq_length() == 0
        cache = handle.new_cache()
        tokens = text_inputs(30)["input_ids"].tolist()
        feed(model, cache, tokens)
        expected = feed(model, copy.deepcopy(cache), [[20, 21]])
        feed(model, cache, [[30, 31, 32]])
        cache.crop(-3)
        assert_close(feed(model, cache, [[20, 21]]), expected)
        with pytest.raises(CacheError, match="only the last 7 .*sliding windows"):
            cache.crop(-8)
        assert not any(layer.is_croppable for layer in cache.layers), "any number of columns, that means"
        cache.reset()
        assert_close(feed(model, cache, tokens), feed(model, handle.new_cache(), tokens))


def test_beams_and_selected_rows_take_their_windows_along():
    model = toy()
    inputs = padded(25)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    stock = model.generate(**inputs, **options)
    with sparsemm.patch(model, config("fullkv", None)) as handle:
        assert torch.equal(model.generate(**inputs, **options), stock)
        cache = handle.new_cache()
        feed(model, cache, inputs["input_ids"].tolist(), inputs["attention_mask"])
        single, bytes_of_two = copy.deepcopy(cache), cache.memory_bytes()
        single.batch_select_indices(torch.tensor([1]))
        assert single.memory_bytes() < bytes_of_two
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        both = feed(model, cache, [[40], [41]], mask)
        assert_close(feed(model, single, [[41]], mask[1:]), both[1:])


def page_inputs(model, processor):
    image = Image.new("RGB", (40, 30), (10, 200, 30))
    return dict(family_of(model).build_inputs(processor, [image], ["Read."]))


def test_an_image_is_seen_in_both_directions():
    """The first token of an image depends on its last one, in full layers too: a causal mask would be noticed."""
    model, processor = toy_vlm("gemma3")
    inputs = page_inputs(model, processor)
    causal = inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
    with torch.no_grad(), sparsemm.patch(model, config("fullkv", None)):
        both, forward = model(**inputs).logits, model(**causal).logits
    assert not torch.allclose(both[:, -1], forward[:, -1])
    with torch.no_grad():
        assert torch.equal(both, model(**inputs).logits) and torch.equal(forward, model(**causal).logits)


def test_caches_of_models_with_other_windows_are_refused():
    model, other = toy("gemma3_text"), toy("gemma3_text, none sliding")
    with sparsemm.patch(other, config("fullkv", None)) as handle:
        cache = handle.new_cache()
    with sparsemm.patch(model, config("fullkv", None)), pytest.raises(CacheError, match="another shape"):
        feed(model, cache, [[20, 21]])

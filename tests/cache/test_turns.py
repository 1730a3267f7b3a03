"""Later turns: padded, compressed again, taken back, of several conversations; the figures kept of them."""

from __future__ import annotations

import copy

import pytest
import torch
from greedy_runs import assert_close, config, reachable_bytes, text_inputs
from toy_models import FAMILIES, single_row, toy_inputs, toy_model

import sparsemm
from sparsemm.errors import CacheError


def feed(model, cache, tokens, mask, deltas=0):
    """Logits of the new columns; `mask` of all columns so far."""
    seen = cache.get_seq_length()
    positions = (mask.cumsum(1) - 1)[:, seen:].clamp(min=0) + deltas
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def ones(mask, columns):
    return torch.cat([mask, torch.ones(mask.shape[0], columns, dtype=torch.long)], dim=1)


# -- compressed again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_rows_with_fewer_than_two_new_tokens_keep_all_they_have(family, method):
    """A padded turn of 0, 1, 2 and 9 tokens: each row reads, and is held, as it is alone."""
    model = toy_model(family)
    prompt, turn = text_inputs(40, batch=4), text_inputs(9, batch=4, seed=1)["input_ids"]
    news = [0, 1, 2, 9]
    mask = ones(prompt["attention_mask"], 9)
    for row, new in enumerate(news):
        mask[row, 40 : 49 - new] = 0
    step = torch.full((4, 1), 12)
    with sparsemm.patch(model, config(method, 14, compress_turns="every")) as handle:
        together = handle.new_cache()
        feed(model, together, prompt["input_ids"], prompt["attention_mask"])
        feed(model, together, turn, mask)
        stats = handle.stats
        after = feed(model, together, step, ones(mask, 1))
        for row, new in enumerate(news):
            alone = handle.new_cache()
            everything = torch.ones(1, 50 + new, dtype=torch.long)
            feed(model, alone, prompt["input_ids"][row : row + 1], everything[:, :40])
            if new:
                feed(model, alone, turn[row : row + 1, 9 - new :], everything[:, : 40 + new])
            assert handle.stats.prompt_tokens[0] == stats.prompt_tokens[row] == (40 if new < 2 else 40 + new)
            assert torch.equal(handle.stats.kept_rows[0], stats.kept_rows[row])
            assert_close(after[row], feed(model, alone, step[:1], everything[:, : 41 + new])[0])
            for ours, theirs in zip(together.layers, alone.layers, strict=True):
                heads = handle.plan.num_kv_heads
                assert ours.lens.view(4, heads)[row].tolist() == theirs.lens.tolist()


def test_a_turn_in_which_no_row_has_two_tokens_compresses_nothing():
    model = toy_model("llava-mistral")
    prompt = text_inputs(40, batch=2)
    mask = ones(prompt["attention_mask"], 3)
    mask[0, 40:] = 0
    mask[1, 41:] = 0
    with sparsemm.patch(model, config("snapkv", 14, compress_turns="every")) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        feed(model, cache, torch.full((2, 3), 20), mask)
        assert [layer.lens.tolist() for layer in cache.layers] == [[14, 14, 15, 15]] * 2
        cache.crop(-3)
        assert [layer.lens.tolist() for layer in cache.layers] == [[14] * 4] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_crop_under_every_works_where_nothing_was_dropped(family):
    """And only there: what was chosen among last cannot be taken back."""
    model = toy_model(family)
    prompt, turn = text_inputs(20), text_inputs(12, seed=1)["input_ids"]
    mask = torch.ones(1, 60, dtype=torch.long)
    with sparsemm.patch(model, config("sparsemm", 32, compress_turns="every", head_scores=_equal(model))) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], mask[:, :20])
        expected = feed(model, copy.deepcopy(cache), turn[:, :5], mask[:, :25])
        feed(model, cache, turn, mask[:, :32])  # 32 tokens: all are kept
        assert handle.stats.prompt_tokens == [32] and handle.stats.effective_budget == 32
        cache.crop(-12)
        assert_close(feed(model, cache, turn[:, :5], mask[:, :25]), expected)
        assert cache.record.stats().prompt_tokens == [25]
        cache.crop(-15)  # into the prompt itself
        assert cache.get_seq_length() == 10
        assert {int(length) for layer in cache.layers for length in layer.lens} == {10}
        assert cache.record.stats().prompt_tokens == [10] and cache.record.stats().effective_budget == 10
        feed(model, cache, prompt["input_ids"][:, 10:], mask[:, :20])
        feed(model, cache, turn, mask[:, :32])
        feed(model, cache, turn, mask[:, :44])  # 44 tokens, 32 rows
        assert handle.stats.prompt_tokens == [44] and handle.stats.effective_budget == 32
        with pytest.raises(CacheError, match="only the last 0 "):
            cache.crop(-1)
        feed(model, cache, turn[:, :1], mask[:, :45])
        with pytest.raises(CacheError, match="only the last 1 "):
            cache.crop(-2)
        cache.crop(-1)


def _equal(model):
    text = model.config.text_config
    return sparsemm.HeadScores(torch.ones(text.num_hidden_layers, text.num_attention_heads, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_of_a_later_turn_see_all_tokens(family):
    """PyramidKV's slope and SparseMM's caps depend on the prompt's length: that of all valid tokens fed so far."""
    model = toy_model(family, num_layers=3)
    prompt, turn = text_inputs(50, batch=2), text_inputs(20, batch=2, seed=1)["input_ids"]
    prompt["attention_mask"][0, :9] = 0
    mask = ones(prompt["attention_mask"], 20)
    mask[1, 50:54] = 0
    for method, table in (("pyramidkv", None), ("sparsemm", _skewed(model))):
        settings = config(method, 44, compress_turns="every", head_scores=table)
        with sparsemm.patch(model, settings) as handle:
            cache = handle.new_cache()
            feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
            held = [layer.lens.view(2, -1).clone() for layer in cache.layers]
            feed(model, cache, turn, mask)
            assert handle.stats.prompt_tokens == [61, 66]
            budgets = torch.stack([handle.plan.budgets(length) for length in (61, 66)])
            assert not torch.equal(budgets[0], handle.plan.budgets(41)) and not torch.equal(budgets[0], budgets[1])
            there = torch.stack(held, dim=1) + torch.tensor([20, 16])[:, None, None]
            assert torch.equal(handle.stats.kept_rows, torch.minimum(budgets, there))


def _skewed(model):
    text = model.config.text_config
    values = torch.arange(1.0, 1 + text.num_hidden_layers * text.num_attention_heads, dtype=torch.float64) ** 2
    return sparsemm.HeadScores(values.view(text.num_hidden_layers, -1))


# -- taken back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_crop_of_columns_that_are_padding_in_some_rows(family):
    """Three rows of 3, 0 and 1 tokens among the last columns: each loses its own."""
    model = toy_model(family)
    prompt, turn = text_inputs(30, batch=3), text_inputs(5, batch=3, seed=1)["input_ids"]
    mask = ones(prompt["attention_mask"], 5)
    mask[1, 32:] = 0
    mask[2, 32:34] = 0
    again, step = ones(mask[:, :32], 1), torch.full((3, 1), 12)
    with sparsemm.patch(model, config("adakv", 12), reserve=2) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        kept = [layer.lens.clone() for layer in cache.layers]
        feed(model, cache, turn[:, :2], mask[:, :32])
        expected = feed(model, copy.deepcopy(cache), step, again)
        feed(model, cache, turn[:, 2:], mask)
        heads = handle.plan.num_kv_heads
        for layer, before in zip(cache.layers, kept, strict=True):
            assert (layer.lens - before).view(3, heads).tolist() == [[5] * heads, [2] * heads, [3] * heads]
        assert handle.stats.full_cache_bytes == (90 + 10) * 2 * 16 * 4 * heads * 2
        cache.crop(-3)
        for layer, before in zip(cache.layers, kept, strict=True):
            assert (layer.lens - before).tolist() == [2] * 3 * heads
        assert cache.record.stats().full_cache_bytes == (90 + 6) * 2 * 16 * 4 * heads * 2
        assert_close(feed(model, cache, step, again), expected)


def test_a_prompt_taken_back_in_part_has_no_more_room_than_its_lists():
    """One row's last columns are padding: taking them back frees no slot of its lists."""
    model = toy_model("llava-vicuna")
    prompt = text_inputs(10, batch=2)
    prompt["attention_mask"][0, 6:] = 0
    with sparsemm.patch(model, config("fullkv", None), reserve=2) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        cache.crop(-4)
        mask = torch.ones(2, 16, dtype=torch.long)
        tokens = text_inputs(10, batch=2, seed=2)["input_ids"]
        for column in range(6):
            logits = feed(model, cache, tokens[:, column : column + 1], mask[:, : 7 + column])
        assert not any(bool(layer.overflow) for layer in cache.layers)
        fresh = handle.new_cache()
        feed(model, fresh, prompt["input_ids"][:, :6], mask[:, :6])
        assert_close(logits[:, -1], feed(model, fresh, tokens[:, :6], mask[:, :12])[:, -1])


# -- conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "generate", "own loop"])
@pytest.mark.parametrize("before", [1, 3])
def test_a_text_conversation_does_not_inherit_the_offsets_of_images(how, before):
    """Qwen2-VL keeps the offsets of the conversation before on the model."""
    images = toy_inputs(toy_model("qwen2-vl"), before)
    embeds = text_inputs(12, batch=2)

    def converse(model, earlier):
        with sparsemm.patch(model, config("fullkv", None)) as handle, torch.no_grad():
            if earlier:
                model(**images, use_cache=True)
            if how == "forward":
                inputs = {"inputs_embeds": model.get_input_embeddings()(embeds["input_ids"])}
                first = model(**inputs, use_cache=True)
                second = model(input_ids=torch.full((2, 1), 20), past_key_values=first.past_key_values)
                first.past_key_values.batch_repeat_interleave(2)
                third = model(input_ids=torch.full((4, 1), 20), past_key_values=first.past_key_values)
                return torch.cat([first.logits[:, -1], second.logits[:, -1], third.logits[:, -1]])
            run = model.generate if how == "generate" else lambda **kw: sparsemm.generate(model, kw, **_pop(kw)).cache
            out = run(**embeds, max_new_tokens=5, return_dict_in_generate=how == "generate")
            cache = out.past_key_values if how == "generate" else out
            assert handle.new_cache().rope_deltas is None
            assert cache.rope_deltas.tolist() == [[0], [0]]
            return model(input_ids=torch.full((2, 1), 20), past_key_values=cache).logits[:, -1]

    assert torch.equal(converse(toy_model("qwen2-vl"), True), converse(toy_model("qwen2-vl"), False))


def _pop(kwargs):
    kwargs.pop("return_dict_in_generate")
    return {"max_new_tokens": kwargs.pop("max_new_tokens")}


@pytest.mark.parametrize("how", ["num_return_sequences", "num_beams"])
def test_offsets_of_several_sequences_of_a_prompt(how):
    """Two prompts with other offsets, three sequences each, then a second turn: every sequence goes on as it does
    alone."""
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 2)
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    deltas = model.model.get_rope_index(**{name: inputs[name] for name in names})[1][:, 0].tolist()
    assert deltas[0] != deltas[1]
    options = dict(num_return_sequences=3, **(dict(num_beams=3) if how == "num_beams" else dict(do_sample=True)))
    with sparsemm.patch(model, config("snapkv", 12)), torch.no_grad():
        torch.manual_seed(0)
        first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, **options)
        cache = first.past_key_values
        assert cache.rope_deltas[:, 0].tolist() == [deltas[0]] * 3 + [deltas[1]] * 3
        mask = ones(inputs["attention_mask"].repeat_interleave(3, 0), 3)
        assert cache.get_seq_length() == mask.shape[1]
        turn = torch.full((6, 2), 30)
        positions = (mask.sum(1, keepdim=True) + torch.arange(2)) + cache.rope_deltas
        if how == "num_beams":  # which beam a row of the cache belongs to is generate's affair
            return
        together = model(
            input_ids=turn, attention_mask=ones(mask, 2), position_ids=positions, past_key_values=cache
        ).logits
        for row in range(6):
            alone = model(**single_row(inputs, row // 3), use_cache=True).past_key_values
            fed = first.sequences[row : row + 1, -4:-1]
            model(input_ids=fed, past_key_values=alone)
            assert_close(together[row], model(input_ids=turn[:1], past_key_values=alone).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_contradict_what_was_fed_are_refused(family):
    model = toy_model(family)
    prompt = text_inputs(20, batch=2)
    prompt["attention_mask"][0, :3] = 0
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        for columns in (1, 4):
            with pytest.raises(CacheError, match="cached columns to be other tokens"):
                feed(model, cache, torch.full((2, columns), 9), torch.ones(2, 20 + columns, dtype=torch.long))
        feed(model, cache, torch.full((2, 2), 9), ones(prompt["attention_mask"], 2))


def test_rows_that_are_not_there_cannot_be_selected():
    model = toy_model("llava-vicuna")
    prompt = text_inputs(20, batch=2)
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        with pytest.raises(IndexError):
            cache.batch_select_indices(torch.tensor([2]))
        with pytest.raises(CacheError, match="no sequence would be left"):
            cache.batch_select_indices(torch.tensor([], dtype=torch.long))
        cache.batch_select_indices(torch.tensor([False, True]))
        assert cache.batch_size == 1 and cache.record.stats().prompt_tokens == [20]


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own_loop", [False, True])
def test_bytes_after_several_steps_of_a_batch(family, own_loop):
    """Of the full cache: every token of every row; held: every tensor that can be reached from the cache."""
    model = toy_model(family)
    inputs = toy_inputs(model, 3)
    text = model.config.text_config
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        if own_loop:
            cache = sparsemm.generate(model, inputs, max_new_tokens=6).cache
        else:
            cache = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True).past_key_values
        rows = int(inputs["attention_mask"].sum()) + 3 * 5
        row_bytes = 2 * 16 * 4 * text.num_key_value_heads * text.num_hidden_layers
        assert handle.stats.full_cache_bytes == rows * row_bytes
        assert handle.stats.cache_bytes == cache.memory_bytes() == reachable_bytes(cache)
        cache.batch_select_indices(torch.tensor([0, 2]))
        rows -= int(inputs["attention_mask"][1].sum()) + 5
        assert handle.stats.full_cache_bytes == rows * row_bytes
        assert handle.stats.cache_bytes == cache.memory_bytes() == reachable_bytes(cache)

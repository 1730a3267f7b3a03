"""Caches beside each other: copied, reordered by beams, repeated, cropped."""

from __future__ import annotations

import copy

import pytest
import torch
from greedy_runs import assert_close, config, greedy, scores, text_inputs
from toy_models import FAMILIES, single_row, toy_inputs, toy_model

import sparsemm
from sparsemm.errors import CacheError


@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_caches_do_not_disturb_each_other(family):
    """Two conversations with different images on one model, advanced in turn (Qwen2-VL: different M-RoPE offsets)."""
    model = toy_model(family)
    conversations = [toy_inputs(model, 1, seed=seed, text_lengths=[7 + 5 * seed]) for seed in (0, 1)]

    def start(inputs):
        return model(**inputs, use_cache=True).past_key_values

    def advance(cache, steps):
        logits = []
        for _ in range(steps):
            # Qwen2-VL works the position out itself, from its M-RoPE offset; the others count columns.
            position_ids = None if family == "qwen2-vl" else torch.tensor([[cache.get_seq_length()]])
            out = model(input_ids=torch.tensor([[13]]), position_ids=position_ids, past_key_values=cache)
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    with sparsemm.patch(model, config("snapkv", 12)), torch.no_grad():
        expected = []
        for inputs in conversations:
            expected.append(advance(start(inputs), 4))
        caches = [start(inputs) for inputs in conversations]
        parts = [[], []]
        for _ in range(2):
            for index in range(2):
                parts[index].append(advance(caches[index], 2))
    for index in range(2):
        assert_close(torch.cat(parts[index], dim=1), expected[index])


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_makes_a_reusable_prompt(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 1)
    extra = torch.full((1, 4), 15)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], extra], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
    }
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in inputs:
        rest["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(extra)], 1)
    del rest["pixel_values"]
    with sparsemm.patch(model, config("sparsemm", 12, head_scores=scores(model))), torch.no_grad():
        prompt = model(**inputs, use_cache=True).past_key_values
        held = prompt.memory_bytes()
        first = greedy(model, longer, past_key_values=copy.deepcopy(prompt))[1]
        second = greedy(model, longer, past_key_values=copy.deepcopy(prompt))[1]
    assert torch.equal(first, second)
    assert prompt.memory_bytes() == held
    assert prompt.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    settings = dict(num_beams=3, num_return_sequences=2, max_new_tokens=8, do_sample=False)
    expected = model.generate(**inputs, **settings)
    with sparsemm.patch(model, config("fullkv", None)):
        assert torch.equal(model.generate(**inputs, **settings), expected)
    with sparsemm.patch(model, config("adakv", 12)):  # beams of one prompt alone and beside another: the same
        both = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        alone = model.generate(**single_row(inputs, 1), **settings)
    assert torch.equal(both[2:], alone[:, -8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_several_returned_sequences(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    settings = dict(do_sample=True, num_return_sequences=2, max_new_tokens=8, temperature=0.8, top_p=0.9)
    torch.manual_seed(5)
    expected = model.generate(**inputs, **settings)
    with sparsemm.patch(model, config("fullkv", None)):
        torch.manual_seed(5)
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_selecting_and_repeating_batch_rows():
    model = toy_model("llava-mistral")
    inputs = text_inputs(40, batch=3)
    inputs["attention_mask"][1, :5] = 0
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def step(cache, batch, rows):
        mask = torch.cat([inputs["attention_mask"][rows], torch.ones(batch, 1, dtype=torch.long)], 1)
        return model(
            input_ids=torch.full((batch, 1), 12),
            attention_mask=mask,
            position_ids=positions[rows, -1:] + 1,
            past_key_values=cache,
        ).logits

    with sparsemm.patch(model, config("adakv", 12)), torch.no_grad():
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
        expected = step(copy.deepcopy(cache), 3, [0, 1, 2])
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(torch.tensor([2, 1]))
        assert chosen.batch_size == 2
        assert_close(step(chosen, 2, [2, 1]), expected[[2, 1]])
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        assert_close(step(repeated, 6, [0, 0, 1, 1, 2, 2]), expected.repeat_interleave(2, 0))


def test_crop_takes_back_generated_columns_and_refuses_the_compressed_prompt():
    model = toy_model("llava-vicuna")
    inputs = text_inputs(30)

    def feed(cache, tokens):
        begin = cache.get_seq_length()
        position_ids = torch.arange(begin, begin + len(tokens))[None]
        return model(input_ids=torch.tensor([tokens]), position_ids=position_ids, past_key_values=cache).logits

    with sparsemm.patch(model, config("snapkv", 10)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = feed(copy.deepcopy(cache), [12, 13])
        feed(cache, [14, 15, 16])
        cache.crop(-3)
        assert cache.get_seq_length() == 30
        assert torch.equal(feed(cache, [12, 13]), expected)
        cache.crop(30)  # a positive count is the final size
        assert cache.get_seq_length() == 30
        with pytest.raises(CacheError, match="only the last 0"):
            cache.crop(-1)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0
        again = model(**inputs, past_key_values=cache)
        assert again.past_key_values is cache
        assert torch.equal(feed(cache, [12, 13]), expected)

"""What a cache is fed behind its prompt: turns, chunks of a prompt, masks with holes."""

from __future__ import annotations

import pytest
import torch
from greedy_runs import NEW, assert_close, config, greedy, text_inputs
from toy_models import FAMILIES, toy_inputs, toy_model

import sparsemm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [1, 3, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_second_turn_with_everything_kept(family, turn, batch):
    """generate, then generate again with more text: 40 new columns take the chunk path, 3 the decode path."""
    model = toy_model(family)
    inputs = toy_inputs(model, batch)
    extra = torch.randint(10, 60, (batch, turn), generator=torch.Generator().manual_seed(4))

    def two_turns():
        ids, _, cache = greedy(model, inputs)
        longer = torch.cat([inputs["input_ids"], ids, extra], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(batch, NEW + turn, dtype=torch.long)], dim=1)
        return greedy(model, {"input_ids": longer, "attention_mask": mask}, past_key_values=cache)[:2]

    expected_ids, expected = two_turns()
    with sparsemm.patch(model, config("fullkv", None)):
        ids, logits = two_turns()
    assert torch.equal(ids, expected_ids)
    assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [5, 17, 30])
def test_chunked_prefill_with_everything_kept(family, size):
    model = toy_model(family)
    inputs = text_inputs(61, batch=2)
    inputs["attention_mask"][0, :9] = 0
    _, expected, _ = greedy(model, inputs)
    try:
        greedy(model, inputs, prefill_chunk_size=size)
    except RuntimeError:
        pytest.skip("this version of transformers cannot prefill the stock model in chunks")
    with sparsemm.patch(model, config("fullkv", None)):
        _, logits, _ = greedy(model, inputs, prefill_chunk_size=size)
    assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_and_chunk_paths_agree_when_rows_are_dropped(family, monkeypatch):
    model = toy_model(family)
    inputs = text_inputs(50, batch=2)
    turn = text_inputs(40, batch=2, seed=1)["input_ids"]

    def two_chunks():
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            position_ids = torch.arange(50, 90).expand(2, -1)
            return model(input_ids=turn, position_ids=position_ids, past_key_values=cache).logits

    with sparsemm.patch(model, config("adakv", 12)):
        split = two_chunks()
        monkeypatch.setattr("sparsemm.cache.layer.MAX_DECODE_QUERIES", 1000)
        whole = two_chunks()
    assert_close(split, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv", "random"])
def test_every_turn_competes_as_one_prompt(family, method):
    """A first turn that fits the budget, then a second: the rows kept are those of both fed as one prompt."""
    model = toy_model(family)
    whole = text_inputs(60, batch=2)
    whole["attention_mask"][0, :7] = 0
    first = {name: tensor[:, :18] for name, tensor in whole.items()}
    position_ids = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    settings = config(method, 18, compress_turns="every")
    step = torch.full((2, 1), 11)
    mask = torch.cat([whole["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)

    def next_logits(cache):
        return model(
            input_ids=step, attention_mask=mask, position_ids=position_ids[:, -1:] + 1, past_key_values=cache
        ).logits

    with sparsemm.patch(model, settings) as handle, torch.no_grad():
        cache = model(**whole, position_ids=position_ids, use_cache=True).past_key_values
        expected_rows, expected = handle.stats.kept_rows, next_logits(cache)
        cache = model(**first, position_ids=position_ids[:, :18], use_cache=True).past_key_values
        model(
            input_ids=whole["input_ids"][:, 18:],
            attention_mask=whole["attention_mask"],
            position_ids=position_ids[:, 18:],
            past_key_values=cache,
        )
        stats = handle.stats
        assert stats.prompt_tokens == [53, 60]
        assert torch.equal(stats.kept_rows, expected_rows)
        assert_close(next_logits(cache), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_masked_in_a_later_turn_are_never_stored(family):
    """A second turn padded on the left, on the right, and in the middle gives the logits of its tokens alone."""
    model = toy_model(family)
    first, second = text_inputs(30, batch=1), text_inputs(6, batch=1, seed=3)["input_ids"]

    def continue_with(columns):
        """columns: tokens or None for padding; logits of the token columns and of one more step."""
        ids = torch.tensor([[0 if token is None else token for token in columns]])
        mask = torch.tensor([[0 if token is None else 1 for token in columns]])
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            mask = torch.cat([first["attention_mask"], mask], dim=1)
            positions = (mask.cumsum(1) - 1)[:, 30:]
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            more = model(
                input_ids=torch.tensor([[12]]),
                attention_mask=mask,
                position_ids=torch.tensor([[30 + sum(token is not None for token in columns)]]),
                past_key_values=cache,
            ).logits
            assert cache.get_seq_length() == 31 + len(columns)
        return torch.cat([logits[:, mask[0, 30:-1].bool()], more], dim=1)

    tokens = second[0].tolist()
    with sparsemm.patch(model, config("snapkv", 12)):
        expected = continue_with(tokens)
        assert_close(continue_with([None, None, *tokens]), expected)
        assert_close(continue_with([*tokens, None]), expected)
        assert_close(continue_with([*tokens[:2], None, None, *tokens[2:]]), expected)
        assert_close(continue_with([None] * 20 + tokens), expected)  # the chunk path
        single = continue_with(tokens[:1])
        assert_close(continue_with([None, tokens[0]]), single)
        assert_close(continue_with([tokens[0], None]), single)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("holes", [[0, 1, 2], [40, 41], [3, 10, 11, 30]])
def test_a_prompt_mask_with_holes(family, holes):
    model = toy_model(family)
    inputs = text_inputs(42, batch=2)
    inputs["attention_mask"][0, holes] = 0
    dense = {name: tensor[:1, inputs["attention_mask"][0].bool()] for name, tensor in inputs.items()}
    with sparsemm.patch(model, config("adakv", 14)) as handle, torch.no_grad():
        alone = step_after(model, dense)
        alone_rows = handle.stats.kept_rows[0]
        both = step_after(model, inputs)
        assert torch.equal(handle.stats.kept_rows[0], alone_rows)
    assert_close(both[:1], alone)


def step_after(model, inputs):
    """Logits of token 12 fed after the prompt `inputs`."""
    batch = inputs["input_ids"].shape[0]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 1, dtype=torch.long)], dim=1)
    return model(
        input_ids=torch.full((batch, 1), 12),
        attention_mask=mask,
        position_ids=positions.max(1, keepdim=True).values + 1,
        past_key_values=cache,
    ).logits

"""The evicting cache against transformers' own cache, on toy models of all families."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from greedy_runs import NEW, all_configs, assert_close, config, greedy, scores, text_inputs
from toy_models import FAMILIES, single_row, toy_inputs, toy_model
from transformers import DynamicCache

import sparsemm
from sparsemm.cache.stats import CacheRecord, share_of_full
from sparsemm.errors import CacheError
from sparsemm.models.parallel import TensorParallel
from sparsemm.plan import Plan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_budget_that_covers_the_prompt_changes_nothing(family, batch):
    model = toy_model(family)
    inputs = toy_inputs(model, batch)
    expected_ids, expected, _ = greedy(model, inputs)
    length = inputs["input_ids"].shape[1]
    for settings in all_configs(model, length + 3):
        with sparsemm.patch(model, settings) as handle:
            ids, logits, _ = greedy(model, inputs)
            assert handle.stats.effective_budget == pytest.approx(inputs["attention_mask"].sum(1).float().mean().item())
        assert torch.equal(ids, expected_ids), settings.method
        assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_the_patch_restores_the_model_bit_for_bit(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    before_state = {name: dict(vars(module)) for name, module in model.named_modules()}
    before_hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    _, before, _ = greedy(model, inputs)
    rope = getattr(model.model, "rope_deltas", None)
    for _ in range(2):
        handle = sparsemm.patch(model, config())
        greedy(model, inputs)
        handle.remove()
        handle.remove()
        if rope is not None:
            assert model.model.rope_deltas is rope
        _, after, cache = greedy(model, inputs)
        rope = getattr(model.model, "rope_deltas", None)
        assert torch.equal(after, before)
        assert type(cache) is DynamicCache
    for name, module in model.named_modules():
        assert set(vars(module)) == set(before_state[name])
        assert len(module._forward_pre_hooks) == before_hooks[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "rounding"),
    [
        *itertools.product(["snapkv", "pyramidkv", "adakv", "sparsemm", "random"], ["exact", "paper"]),
        *((method, "exact") for method in ("expected_attention", "mixkv", "vl_cache")),
    ],
)
def test_each_row_of_a_padded_batch_reads_as_if_alone(family, method, rounding):
    model = toy_model(family)
    inputs = toy_inputs(model, 3)
    table = scores(model) if method == "sparsemm" else None
    with sparsemm.patch(model, config(method, 14, head_scores=table, rounding=rounding)) as handle:
        _, together, _ = greedy(model, inputs)
        kept = handle.stats.kept_rows
        for row in range(3):
            single = single_row(inputs, row)
            _, alone, _ = greedy(model, single)
            assert torch.equal(handle.stats.kept_rows[0], kept[row])
            assert_close(together[:, row], alone[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "rounding"),
    [*itertools.product(["snapkv", "adakv", "random"], ["exact", "paper"]), ("vl_cache", "exact")],
)
def test_kept_rows_and_bytes(family, method, rounding):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    text = model.config.text_config
    head_dim = model.model.language_model.layers[0].self_attn.head_dim
    with sparsemm.patch(model, config(method, 14, rounding=rounding), reserve=10) as handle:
        _, _, cache = greedy(model, inputs, tokens=8)
    stats = handle.stats
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert stats.prompt_tokens == lengths
    if rounding == "exact":
        for row, length in enumerate(lengths):
            assert int(stats.kept_rows[row].sum()) == 14 * text.num_hidden_layers * text.num_key_value_heads
            assert int(stats.kept_rows[row].max()) <= length
        assert stats.effective_budget == 14
    row_bytes = 2 * 4 * head_dim
    lists = 2 * text.num_key_value_heads
    slots = int(stats.kept_rows.sum()) + text.num_hidden_layers * lists * 10
    index_bytes = text.num_hidden_layers * 4 * (4 * lists + 2)
    beside = 2 * (max(lengths) + 7) if min(lengths) < max(lengths) else 0  # the mask
    beside += 2 * 8 if family == "qwen2-vl" else 0  # offsets of M-RoPE
    assert cache.memory_bytes() == stats.cache_bytes == slots * row_bytes + index_bytes + beside
    rows_of_all = text.num_hidden_layers * text.num_key_value_heads * (sum(lengths) + 2 * 7)
    assert stats.full_cache_bytes == rows_of_all * row_bytes
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 7


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_full_length_keys_survives_prefill(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 1)
    length = inputs["input_ids"].shape[1]
    attention = model.model.language_model.layers[0].self_attn
    full = length * attention.head_dim * model.config.text_config.num_key_value_heads * 4
    with sparsemm.patch(model, config(budget=9, window_size=8), reserve=1):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        gc.collect()
        reachable = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        own = {id(item) for item in list(model.parameters()) + list(model.buffers()) + list(inputs.values())}
        for tensor in reachable:
            if id(tensor) in own or tensor.dim() < 2 or tensor.shape[-1] != attention.head_dim:
                continue
            assert tensor.untyped_storage().nbytes() < full, tuple(tensor.shape)
        assert cache.memory_bytes() < full * 2 * model.config.text_config.num_hidden_layers / 2


@pytest.mark.parametrize(("tokens", "rows", "more"), [(40, 1, 64), (40, 100, 100), (899, 1, 900 // 8)])
def test_buffers_grow_by_an_eighth_and_no_more(tokens, rows, more):
    """So that appending costs the same however long the cache is, and its slack stays a small share of it."""
    model = toy_model("llava-vicuna")
    with sparsemm.patch(model, config("fullkv", None), reserve=1), torch.no_grad():
        layer = model(**text_inputs(tokens, batch=1), use_cache=True).past_key_values.layers[0]
        lists, before = layer.lens.shape[0], layer.key_buffer.shape[0]
        assert before == lists * (tokens + 1)
        layer.grow(rows)
        assert layer.key_buffer.shape[0] - before == layer.value_buffer.shape[0] - before == lists * more


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fullkv", "snapkv", "adakv"])
def test_growing_buffers_give_the_text_of_large_ones(family, method):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    budget = None if method == "fullkv" else 12
    with sparsemm.patch(model, config(method, budget), reserve=200):
        _, expected, _ = greedy(model, inputs, tokens=100)
    with sparsemm.patch(model, config(method, budget), reserve=1) as handle:
        _, logits, cache = greedy(model, inputs, tokens=100)
    assert_close(logits, expected)
    assert handle.stats.cache_bytes == cache.memory_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_prompts_around_the_window(family, length):
    """One token, shorter than the window, as long, one more: all kept under any method, text as unpatched."""
    model = toy_model(family)
    inputs = text_inputs(length)
    _, expected, _ = greedy(model, inputs)
    for rounding in ("exact", "paper"):
        for settings in all_configs(model, 9, rounding=rounding):
            with sparsemm.patch(model, settings) as handle:
                _, logits, _ = greedy(model, inputs)
                kept = handle.stats.kept_rows
            assert int(kept.max()) <= length
            assert int(kept.min()) >= min(length, 8)
            if rounding == "exact" or length < 9:
                assert int(kept.min()) == length
                assert_close(logits, expected)


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


def test_an_empty_dynamic_cache_becomes_ours_in_place():
    model = toy_model("llava-vicuna")
    inputs = text_inputs(30)
    with sparsemm.patch(model, config("snapkv", 10)), torch.no_grad():
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        assert isinstance(cache, sparsemm.SparseCache)
        assert cache.get_seq_length() == 30


@pytest.mark.parametrize("short_row", [None, 0, 1])
def test_top_columns_are_the_largest_attention_weights(short_row):
    """Also where the last list is the shortest, and the buffer ends behind it."""
    model = toy_model("qwen2-vl")
    model.set_attn_implementation("eager")
    inputs = toy_inputs(model, 2) if short_row is None else text_inputs(30, batch=2)
    if short_row is not None:
        inputs["attention_mask"][short_row, :20] = 0
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    padding = (inputs["attention_mask"] == 0).sum(1)
    found = {}

    def observer(layer_idx, query, layer):
        found[layer_idx] = layer.top_columns(query[:, :, -1:])[:, :, 0]

    with sparsemm.patch(model, config("fullkv", None), reserve=1) as handle, torch.no_grad():
        handle.observer = observer
        model(**inputs, use_cache=True)
    assert len(found) == model.config.text_config.num_hidden_layers
    for layer_idx, columns in found.items():
        assert torch.equal(columns + padding[:, None], attentions[layer_idx][:, :, -1].argmax(-1))


def test_a_share_of_a_full_cache_counts_the_same_tokens_on_both_sides():
    assert share_of_full(200, 200, 17) == 1.0
    assert share_of_full(50, 200, 0) == 0.25 and share_of_full(50, 200, 100) == 0.5


def test_figures_of_a_divided_model_are_those_of_all_its_heads():
    """Two processes of one kv head each, here one after the other, say what each has."""
    rows = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]])  # of sequences, layers, heads

    class Together(TensorParallel):
        def collect(self, value):
            kept, held, sliding = value
            return [(rows[..., :1], held + 7, 0), (kept, held, sliding)]

    plan = Plan(config("snapkv", 12), 3, 4, 2, 16, parallel=Together(1, 2, None, True))
    record = CacheRecord(plan, prompt_tokens=[40, 30], layer_bytes={0: 100, 1: 60})
    record.kept = [rows[:, layer_idx, 1].int() for layer_idx in range(3)]
    stats = record.stats()
    assert torch.equal(stats.kept_rows, rows)
    assert stats.effective_budgets == [21 / 6, 57 / 6]
    assert (stats.cache_bytes, stats.bytes_by_rank) == (327, [167, 160])

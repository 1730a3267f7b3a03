"""The evicting cache against transformers' own cache, on toy models of all families."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from greedy_runs import all_configs, assert_close, config, greedy, scores, text_inputs
from toy_models import FAMILIES, single_row, toy_inputs, toy_model
from transformers import DynamicCache

import sparsemm
from sparsemm.cache.stats import CacheRecord, share_of_full
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

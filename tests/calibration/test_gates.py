"""Gates, integrated gradients and distortion curves of one page against what they mean."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import baselines
import numpy as np
import pytest
import reference
import torch
from toy_models import FAMILIES, toy_inputs, toy_model
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsemm.calibration.curves import distortions, head_columns, row_grid
from sparsemm.calibration.page import (
    GATES,
    answer_loss,
    distortion_curves,
    gated,
    integrated_gradients,
    read_prompt,
    retrieval_scores,
)
from sparsemm.calibration.taps import constant_weights, tapped

WINDOW = 4


@dataclass(frozen=True)
class Ranking:
    window_size: int = WINDOW
    kernel_size: int = 5


def setting(family, dtype=torch.float32, **options):
    """A model, a prompt that it has read, and an answer."""
    model = toy_model(family, dtype=dtype, **options)
    if dtype == torch.float64:
        widen_norms(model)
    answer = torch.randint(5, 100, (1, 5), generator=torch.Generator().manual_seed(3))
    with constant_weights(model):
        prompt = read_prompt(model, toy_inputs(model, 1, seed=1), Ranking())
    return model, prompt, answer


def widen_norms(model):
    """transformers' RMS norms compute in float32, where finite differences drown."""
    for norm in model.model.language_model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = lambda states, norm=norm: torch.nn.functional.rms_norm(
                states, states.shape[-1:], norm.weight, norm.variance_epsilon
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_open_gates_change_no_bit(family, implementation):
    model, prompt, answer = setting(family, num_layers=3, attn_implementation=implementation)
    shape = (3, model.config.text_config.num_attention_heads)
    with torch.no_grad():
        with gated(model, prompt, torch.ones(shape), WINDOW):
            model.model.rope_deltas = prompt.rope_deltas
            found = model(input_ids=answer[:, :-1], past_key_values=prompt.memory).logits
        cache = DynamicCache()
        first = model(**toy_inputs(model, 1, seed=1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        expected = model(input_ids=answer[:, :-1], past_key_values=cache).logits
        with gated(model, prompt, torch.zeros(shape), WINDOW):
            closed = model(input_ids=answer[:, :-1], past_key_values=prompt.memory).logits
    assert torch.equal(prompt.logits, first.logits[:, -1]) and torch.equal(found, expected)
    assert not torch.allclose(closed, expected)


def test_nothing_is_left_on_the_model():
    model, prompt, answer = setting("qwen2-vl")
    model.model.rope_deltas = deltas = torch.tensor([[7]])
    trained = [each.requires_grad for each in model.parameters()]
    names = set(ALL_ATTENTION_FUNCTIONS)
    own = model.config.text_config._attn_implementation
    model.train()
    with constant_weights(model):
        read_prompt(model, toy_inputs(model, 1, seed=1), Ranking())
        integrated_gradients(model, prompt, answer, WINDOW)
        distortion_curves(model, prompt, answer, WINDOW)
    assert model.training and [each.requires_grad for each in model.parameters()] == trained
    assert all(each.grad is None for each in model.parameters())
    assert model.model.rope_deltas is deltas and set(ALL_ATTENTION_FUNCTIONS) == names
    assert model.config.text_config._attn_implementation == own
    assert "forward" not in vars(model.model.language_model.layers[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_equal_central_differences(family):
    model, prompt, answer = setting(family, torch.float64)
    layers, heads = 2, model.config.text_config.num_attention_heads
    with constant_weights(model):
        found, losses = integrated_gradients(model, prompt, answer, WINDOW)

    def loss(gates):
        with torch.no_grad(), gated(model, prompt, gates, WINDOW):
            return float(answer_loss(model, prompt, answer))

    step, expected = 1e-5, torch.zeros(layers, heads, dtype=torch.float64)
    for gate in GATES:
        weight = (0.5 if gate in (0.0, 1.0) else 1.0) / (len(GATES) - 1)
        for layer, head in itertools.product(range(layers), range(heads)):
            moved = torch.full((2, layers, heads), gate, dtype=torch.float64)
            moved[0, layer, head] += step
            moved[1, layer, head] -= step
            expected[layer, head] += weight * (loss(moved[0]) - loss(moved[1])) / (2 * step)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert losses == [loss(torch.full((layers, heads), gate, dtype=torch.float64)) for gate in GATES]


@pytest.mark.parametrize("family", FAMILIES)
def test_curves_equal_attention_to_the_rows_kept(family):
    """One row number after the other, the model's own attention run again on what SnapKV would have kept."""
    model, prompt, answer = setting(family, torch.float64)
    with constant_weights(model):
        curves = distortion_curves(model, prompt, answer, WINDOW)
    rows = [row for row in row_grid(WINDOW, prompt.length) if row < prompt.length]
    assert list(curves) == ["distortions", "distortions_mixkv"]
    assert not torch.equal(*curves.values())
    inputs, hooks, states = {}, [], {}
    for index, layer in enumerate(model.model.language_model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]})))

    def noted(attend, module, query, key, value, mask, **kwargs):
        states[module.layer_idx] = (query[0], key[0], value[0], module, kwargs["scaling"])
        return attend(module, query, key, value, mask, **kwargs)

    with torch.no_grad(), tapped(model.model.language_model, noted):
        answer_loss(model, prompt, answer)
    for hook in hooks:
        hook.remove()
    for layer, (query, key, value, module, scaling) in states.items():
        for name, found in curves.items():
            assert found.shape == (2, model.config.text_config.num_attention_heads, len(rows))
            expected = by_masks(query, key, value, prompt.rankings[name][layer], rows, scaling, module.o_proj.weight)
            expected = expected / inputs[layer][0].norm(dim=-1)
            torch.testing.assert_close(found[layer], expected.mean(-1), rtol=1e-9, atol=1e-12)


def by_masks(query, key, value, ranking, rows, scaling, weight):
    """‖W_o (o_r - o_full)‖ `[heads, rows, queries]`, every softmax computed anew over the rows that are there."""
    heads, queries, head_dim = query.shape
    group, total = heads // key.shape[0], key.shape[1]
    prompt = total - queries
    result = torch.zeros(heads, len(rows), queries, dtype=torch.float64)
    for head in range(heads):
        kv_head = head // group
        part = weight[:, head * head_dim : (head + 1) * head_dim]
        for token in range(queries):

            def output(kept, head=head, kv_head=kv_head, token=token):
                kept = [*kept, *range(prompt, prompt + token + 1)]
                logits = key[kv_head, kept] @ query[head, token] * scaling
                return logits.softmax(0) @ value[kv_head, kept]

            full = output(range(prompt))
            for place, row in enumerate(rows):
                ranked = ranking[kv_head, : row - WINDOW].tolist()
                kept = output([*ranked, *range(prompt - WINDOW, prompt)])
                result[head, place, token] = (part @ (kept - full)).norm()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_retrieval_scores_equal_those_read_off_whole_attention_matrices(family):
    """Prompt and answer as one text through the eager model; the largest weights, one row and head after the other."""
    model, prompt, answer = setting(family, torch.float64)
    needle = torch.tensor([4, 5, 9, 12])
    with constant_weights(model):
        found = retrieval_scores(model, prompt, answer, needle)
    inputs = toy_inputs(model, 1, seed=1)
    together = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer[:, :-1]], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            more = torch.full_like(answer[:, :-1], 1 if name == "attention_mask" else 0)
            together[name] = torch.cat([inputs[name], more], dim=1)
    eager = toy_model(family, dtype=torch.float64, attn_implementation="eager")
    widen_norms(eager)
    with torch.no_grad():
        matrices = eager(**together, output_attentions=True).attentions
    assert found.shape == (2, model.config.text_config.num_attention_heads)
    for layer, head in itertools.product(range(2), range(found.shape[1])):
        expected = 0.0
        for token in range(4):  # the fifth ends the answer
            row = matrices[layer][0, head, prompt.length - 1 + token].tolist()
            largest = sorted(range(len(row)), key=lambda column: -row[column])[: len(needle)]
            expected += sum(row[column] for column in largest if column in needle.tolist()) / len(needle) / 4
        assert float(found[layer, head]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert (found > 0).any()


def test_rankings_are_those_of_the_selection():
    """The columns before the window by the float64 reference's pooled scores."""
    model = toy_model("llava-mistral", dtype=torch.float64)
    states = {}

    def noted(attend, module, query, key, value, *rest, **kwargs):
        states[module.layer_idx] = (query[0].numpy(), key[0].numpy(), value[0].numpy())
        return attend(module, query, key, value, *rest, **kwargs)

    inputs = toy_inputs(model, 1, seed=1)
    with torch.no_grad(), tapped(model.model.language_model, noted):
        model(**inputs)
    prompt = read_prompt(model, inputs, Ranking())
    for layer, (query, key, value) in states.items():
        scores = {
            "distortions": reference.pooled_scores(query[:, -WINDOW:], key, WINDOW, 5, 16**-0.5),
            "distortions_mixkv": baselines.mixkv(query, key, value, WINDOW, 16**-0.5),
        }
        for name, expected in scores.items():
            for head, columns in enumerate(prompt.rankings[name][layer].tolist()):
                values = expected[head][columns]
                assert sorted(columns) == list(range(expected.shape[1]))
                assert (np.diff(values) <= 1e-6 * abs(values).max()).all()  # positions are scored in float32


def test_the_grid_is_one_for_all_lengths():
    whole = row_grid(4, 1000)
    assert whole[0] == 4 and whole == sorted(set(whole)) and whole[-2] < 1000 <= whole[-1]
    for length in (4, 5, 100, 128, 129):
        assert row_grid(4, length) == [row for row in whole if row < length] + [min(r for r in whole if r >= length)]


def test_a_bias_of_the_projection_is_no_heads():
    """Where the projection is not a plain matrix, a head's columns are read off what it does."""
    projection = torch.nn.Linear(8, 6, dtype=torch.float64)
    columns = head_columns(projection, 2, 4, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(columns, projection.weight.T.reshape(2, 4, 6), rtol=1e-12, atol=1e-12)


def test_a_generated_row_is_seen_by_those_behind_it_only():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (3, 12, 12))
    ranking = torch.arange(5).expand(2, -1)
    columns = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    found = distortions(query, key, value, ranking, [4, 6], 0.5, columns)
    key[:, -1], value[:, -1] = 100.0, -100.0  # the last generated row: nobody but its own query may notice
    again = distortions(query, key, value, ranking, [4, 6], 0.5, columns)
    assert torch.equal(found[..., :2], again[..., :2]) and not torch.allclose(found[..., 2], again[..., 2])

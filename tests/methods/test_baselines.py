"""Methods of other papers against float64 references written from their equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import baselines
import numpy as np
import pytest
import torch
from reference import cut_margin
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparsemm.cache.selection import select_positions
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.head_scores import Curves, HeadScores
from sparsemm.methods import METHODS, BudgetRequest, PromptStates
from sparsemm.models.layers import mean_rotation
from sparsemm.plan import Plan, head_budgets

WINDOW = 6


def sinks_first(key: np.ndarray) -> list[float]:
    return [np.inf if place < 4 else place for place in range(len(key))]


def smallest_norm(key: np.ndarray) -> list[float]:
    return [-np.sqrt(sum(entry * entry for entry in row)) for row in key]


def unlike_the_mean(key: np.ndarray) -> list[float]:
    directions = [row / np.sqrt(row @ row) for row in key]
    mean = sum(directions) / len(directions)
    return [-(mean @ direction) / np.sqrt(mean @ mean) for direction in directions]


BASELINES: dict[str, Callable[[np.ndarray], list[float]]] = {
    "streaming_llm": sinks_first,
    "knorm": smallest_norm,
    "keydiff": unlike_the_mean,
}


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("budget", [WINDOW, WINDOW + 2, 15, 39, 40])
def test_kept_positions_follow_the_papers_score(method: str, budget: int) -> None:
    """Two prompts of unequal length in one padded batch: padding is neither kept nor part of any mean."""
    generator = torch.Generator().manual_seed(budget)
    query = torch.randn(2, 4, 40, 8, generator=generator)
    key = torch.randn(2, 2, 40, 8, generator=generator) + torch.randn(1, 2, 1, 8, generator=generator)
    mask = torch.ones(2, 40)
    mask[1, :9] = 0
    key[1, :, :9] = 1000.0
    config = CompressionConfig(method, budget, window_size=WINDOW)
    kept = select_positions(query, key, config, layer_idx=1, num_layers=2, attention_mask=mask)
    for row, first in enumerate([0, 9]):
        length = 40 - first
        for head in range(2):
            scores = BASELINES[method](key[row, head, first:].double().numpy())[: length - WINDOW]
            beyond = min(budget, length) - WINDOW
            ranking = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
            if method != "streaming_llm":
                assert cut_margin([scores[place] for place in ranking], beyond) > 1e-5
            expected = sorted(first + place for place in ranking[:beyond]) + list(range(40 - WINDOW, 40))
            assert kept[row][head].tolist() == expected


ALIKE = [*BASELINES, "expected_attention", "mixkv"]
"""Methods that give all heads as many rows."""


@pytest.mark.parametrize("method", ALIKE)
def test_budgets_are_exact_and_have_no_release_to_follow(method: str) -> None:
    shape = {"num_layers": 3, "num_query_heads": 4, "num_kv_heads": 2}
    for length in (3, WINDOW, 20, 50):
        rows = head_budgets(CompressionConfig(method, 20, window_size=WINDOW), **shape, prompt_length=length)
        assert (rows == min(20, length)).all()


@pytest.mark.parametrize("method", [*ALIKE, "vl_cache", "head_kv", "rate_distortion", "rate_distortion_mixkv"])
def test_the_releases_rounding_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"rounding='paper'.*'{method}' is none of them"):
        CompressionConfig(method, 20, HeadScores([[1.0]]), window_size=WINDOW, rounding="paper")


# -- values, queries before their rotation, tokens behind the image ----------------------------------------------------


def padded_batch(seed: int) -> tuple[PromptStates, list[int]]:
    """Two prompts of 40 and 29 tokens, image tokens at 5 .. 11 of each; what stands in the padding is large."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int, shift: float = 0.0) -> torch.Tensor:
        states = torch.randn(2, heads, 40, 8, generator=generator) + shift * torch.randn(8, generator=generator)
        states[1, :, :11] = 50.0
        return states

    image = torch.zeros(2, 40, dtype=torch.bool)
    image[0, 5:12] = image[1, 16:23] = True
    states = PromptStates(
        query=drawn(4),
        key=drawn(2, 1.0),
        starts=torch.tensor([[0, 0], [11, 11]], dtype=torch.int32),
        num_queries=torch.tensor([40, 29], dtype=torch.int32),
        window_size=WINDOW,
        scaling=0.3,
        value=drawn(2),
        image=image,
        unrotated=drawn(4, 0.5),
        ahead=torch.stack([torch.from_numpy(baselines.mean_rotation(8, 100.0, at, 64)).float() for at in (40, 29)]),
    )
    return states, [0, 11]


def test_expected_attention_looks_over_the_next_512_positions() -> None:
    """By the rotary embedding of a model; the reference sums rotation matrices."""
    settings = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    model = SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(settings))
    ahead = METHODS["expected_attention"].positions_ahead
    cos, sin = mean_rotation(model, torch.tensor([[39], [7]]), ahead)
    for row, begin in enumerate((40, 8)):
        rotation = baselines.mean_rotation(8, 10000.0, begin, 512)
        np.testing.assert_allclose(cos[row, 0].numpy(), rotation.diagonal(), atol=1e-6)
        np.testing.assert_allclose(sin[row, 0, :4].numpy(), rotation[4:, :4].diagonal(), atol=1e-6)


def of_row(states: PromptStates, row: int, first: int) -> dict[str, np.ndarray]:
    names = ("query", "key", "value", "unrotated")
    return {name: getattr(states, name)[row, :, first:].double().numpy() for name in names}


def test_scores_of_mixkv_and_expected_attention_are_the_papers() -> None:
    states, firsts = padded_batch(0)
    mixed = METHODS["mixkv"].score_positions(CompressionConfig("mixkv", 20, window_size=WINDOW), states)
    expected = METHODS["expected_attention"].score_positions(None, states)
    for row, first in enumerate(firsts):
        own = of_row(states, row, first)
        wanted = baselines.mixkv(own["query"], own["key"], own["value"], WINDOW, 0.3)
        np.testing.assert_allclose(mixed[row, :, first:].double().numpy(), wanted, rtol=1e-4)
        rotation = states.ahead[row].double().numpy()
        wanted = baselines.expected(own["unrotated"], own["key"], own["value"], rotation, 0.3)[:, :-WINDOW]
        np.testing.assert_allclose(expected[row, :, first:].double().numpy(), wanted, rtol=1e-4)


def test_expected_attention_of_a_later_turn_asks_all_its_queries() -> None:
    states, firsts = padded_batch(3)
    states = dataclasses.replace(
        states, query=states.query[:, :, 25:], unrotated=states.unrotated[:, :, 25:], num_queries=torch.tensor([15, 15])
    )
    found = METHODS["expected_attention"].score_positions(None, states)
    for row, first in enumerate(firsts):
        key, value = (getattr(states, name)[row, :, first:].double().numpy() for name in ("key", "value"))
        asked, rotation = (getattr(states, name)[row].double().numpy() for name in ("unrotated", "ahead"))
        wanted = baselines.expected(asked, key, value, rotation, 0.3, left_out=0)[:, : found.shape[-1] - first]
        np.testing.assert_allclose(found[row, :, first:].double().numpy(), wanted, rtol=1e-4)


def test_vl_cache_asks_the_last_token_where_an_image_ends_just_before_it() -> None:
    states, firsts = padded_batch(4)
    states.image[:, 38] = True
    scores, density = METHODS["vl_cache"].score_layer(None, states)
    for row, first in enumerate(firsts):
        own, image = of_row(states, row, first), states.image[row, first:].numpy()
        sums, dense = baselines.behind_the_image(own["query"], own["key"], image, 0.3)
        np.testing.assert_allclose(scores[row, :, first:].double().numpy(), sums[:, :-WINDOW], rtol=1e-4)
        assert float(density[row].mean()) == pytest.approx(dense, abs=1e-12)


@pytest.mark.parametrize("images", [True, False])
def test_scores_and_density_of_vl_cache_are_the_papers(images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm.methods.vl_cache._TILE", 7)
    states, firsts = padded_batch(1)
    states.image[:] &= images
    scores, density = METHODS["vl_cache"].score_layer(None, states)
    for row, first in enumerate(firsts):
        own, image = of_row(states, row, first), states.image[row, first:].numpy()
        sums, dense = baselines.behind_the_image(own["query"], own["key"], image, 0.3)
        np.testing.assert_allclose(scores[row, :, first:].double().numpy(), sums[:, :-WINDOW], rtol=1e-4)
        assert float(density[row].mean()) == pytest.approx(dense, abs=1e-12) and 0.1 < dense < 0.999


@pytest.mark.parametrize("length", [13, 17, 40, 400])
@pytest.mark.parametrize("budget", [WINDOW, 12, 16])
def test_budgets_of_vl_cache_and_head_kv_are_the_papers(length: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(length + budget)
    dense = torch.rand(5, 2, generator=generator, dtype=torch.float64) ** 3
    settings = CompressionConfig("vl_cache", budget, window_size=WINDOW)
    if budget < length:
        rows = METHODS["vl_cache"].prompt_budgets(BudgetRequest(settings, 5, 4, 2, length), dense)
        wanted = baselines.vl_cache_rows(dense.mean(1).tolist(), budget, WINDOW, length)
        assert rows.tolist() == [[each] * 2 for each in wanted] and int(rows.sum()) == 10 * budget
    retrieval = torch.rand(5, 4, generator=generator, dtype=torch.float64) ** 4
    table = HeadScores(torch.ones(5, 4), curves=Curves([4], torch.ones(5, 4), torch.ones(5, 4, 1), retrieval))
    settings = CompressionConfig("head_kv", budget, table, window_size=WINDOW)
    rows = head_budgets(settings, num_layers=5, num_query_heads=4, num_kv_heads=2, prompt_length=length)
    assert rows.tolist() == baselines.head_kv_rows(retrieval.numpy(), 2, budget, WINDOW, length).tolist()
    assert int(rows.sum()) == 10 * min(budget, length)


def test_layers_that_see_nothing_share_the_budget_of_vl_cache() -> None:
    request = BudgetRequest(CompressionConfig("vl_cache", 10, window_size=WINDOW), 3, 4, 2, 100)
    for said in (torch.zeros(3, 2), torch.full((3, 2), torch.nan)):
        assert METHODS["vl_cache"].prompt_budgets(request, said.double()).tolist() == [[10, 10]] * 3


def test_what_a_method_sees_has_to_be_given() -> None:
    states, _ = padded_batch(2)
    where = {"layer_idx": 0, "num_layers": 2}
    config = CompressionConfig("mixkv", 12, window_size=WINDOW)
    with pytest.raises(ConfigError, match="'mixkv' ranks positions by value, which only a patched model has"):
        select_positions(states.query, states.key, config, **where)
    assert len(select_positions(states.query, states.key, config, value=states.value, **where)[0][0]) == 12
    with pytest.raises(ValueError, match="value"):
        select_positions(states.query, states.key, config, value=states.value[:, :, 1:], **where)
    config = CompressionConfig("expected_attention", 12, window_size=WINDOW)
    with pytest.raises(ConfigError, match="by unrotated and ahead"):
        select_positions(states.query, states.key, config, value=states.value, **where)
    config = CompressionConfig("vl_cache", 12, window_size=WINDOW)
    with pytest.raises(ConfigError, match="depend on every layer"):
        select_positions(states.query, states.key, config, **where)
    with pytest.raises(ConfigError, match="depend on the attention scores"):
        head_budgets(config, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=40)
    for covered in (40, 60):
        config = CompressionConfig("vl_cache", covered, window_size=WINDOW)
        kept = select_positions(states.query, states.key, config, **where)
        assert kept[0][0].tolist() == list(range(40))


def test_a_calibration_without_needles_is_refused() -> None:
    table = HeadScores(torch.ones(2, 4), curves=Curves([4], torch.ones(2, 4), torch.ones(2, 4, 1)))
    with pytest.raises(HeadScoreError, match="'head_kv' follows retrieval scores.*said where its answer stands"):
        Plan(CompressionConfig("head_kv", 12, table, window_size=WINDOW), 2, 4, 2)
    with pytest.raises(HeadScoreError, match="'head_kv' needs a calibration"):
        Plan(CompressionConfig("head_kv", 12, HeadScores(torch.ones(2, 4)), window_size=WINDOW), 2, 4, 2)

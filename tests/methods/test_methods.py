"""The method table: what it knows and refuses, a method of one's own, and which heads are masked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from sparsemm.cache.selection import select_positions
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import METHODS, BudgetRequest, Method, PromptStates, get_method, register_method
from sparsemm.methods.snapkv import average_pooled
from sparsemm.plan import Plan, head_budgets


def test_the_table() -> None:
    assert list(METHODS) == [
        "fullkv", "streaming_llm", "knorm", "keydiff", "snapkv", "pyramidkv", "adakv", "expected_attention", "vl_cache",
        "mixkv", "head_kv", "sparsemm", "random", "rate_distortion", "rate_distortion_mixkv", "mask",
        "mask_random",
    ]  # fmt: skip
    assert all(METHODS[name].name == name for name in METHODS)
    assert {name for name in METHODS if not METHODS[name].compresses} == {"fullkv", "mask", "mask_random"}


def test_unknown_names_are_errors_not_the_full_cache() -> None:
    for name in ("streaming", "FULLKV", "", None, 3):
        with pytest.raises(ConfigError, match="is unknown; use one of adakv, expected_attention, fullkv"):
            get_method(name)


def test_a_method_has_one_budget_rule() -> None:
    with pytest.raises(ValueError, match="two budget rules"):
        Method(
            "both", model_budgets=get_method("snapkv").model_budgets, layer_budgets=get_method("adakv").layer_budgets
        )


# -- a method of one's own: attention sinks and a sliding window (StreamingLLM) ----------------------------------------

NUM_SINKS = 4


def streaming_budgets(request: BudgetRequest) -> Tensor:
    rows = min(request.settings.budget, request.prompt_length)
    return torch.full((request.num_layers, request.num_kv_heads), rows)


def sinks_then_recent(config: CompressionConfig, states: PromptStates) -> Tensor:
    place = (torch.arange(states.columns, device=states.key.device) - states.starts[..., None]).float()
    return torch.where(place < NUM_SINKS, torch.inf, place)


@pytest.fixture
def streaming() -> Iterator[Method]:
    method = Method("streaming", model_budgets=streaming_budgets, score_positions=sinks_then_recent)
    yield register_method(method)
    del METHODS["streaming"]


def test_adding_a_method_is_one_entry(streaming: Method) -> None:
    config = CompressionConfig("streaming", 20, window_size=8)
    rows = head_budgets(config, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=50)
    assert rows.tolist() == [[20, 20], [20, 20]]
    query, key = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)
    mask = torch.ones(2, 50)
    mask[1, :10] = 0
    kept = select_positions(query, key, config, layer_idx=0, num_layers=2, attention_mask=mask)
    for row, first in enumerate([0, 10]):
        for positions in kept[row]:
            assert positions.tolist() == [*range(first, first + NUM_SINKS), *range(34, 50)]
    with pytest.raises(ConfigError, match="budget=4 is smaller"):
        CompressionConfig("streaming", 4, window_size=8)


def test_names_are_taken_once(streaming: Method) -> None:
    with pytest.raises(ConfigError, match="already registered"):
        register_method(Method("streaming"))
    replacement = Method("streaming")
    assert register_method(replacement, replace=True) is get_method("streaming")


# -- masked heads (spec section 6) -------------------------------------------------------------------------------------


def masked(method: str, scores: HeadScores, **settings: object) -> Tensor:
    config = CompressionConfig(method, head_scores=scores, **settings)
    shape = tuple(scores.values.shape)
    return Plan(config, *shape, shape[1]).masked_heads


def test_mask_takes_the_top_heads_of_the_model() -> None:
    scores = HeadScores([[0.0, 5.0, 1.0, 9.0], [8.0, 0.0, 0.0, 2.0]])
    assert masked("mask", scores, mask_ratio=0.25).tolist() == [[False] * 3 + [True], [True] + [False] * 3]
    assert masked("mask", scores, mask_ratio=0.5).sum() == 4
    assert masked("mask", scores, mask_ratio=0.1).sum() == 0  # floor(0.8)
    assert masked("mask", scores, mask_ratio=1.0).all()


def test_mask_ties_go_to_the_lower_layer_then_head() -> None:
    scores = HeadScores([[1, 2, 1], [2, 1, 2]])
    assert masked("mask", scores, mask_ratio=0.7).tolist() == [[True, True, False], [True, False, True]]


def test_mask_counts_are_floors_of_decimal_ratios() -> None:
    scores = HeadScores(torch.rand(10, 10, generator=torch.Generator().manual_seed(0)))
    for hundredths in range(51):
        assert masked("mask", scores, mask_ratio=hundredths / 100).sum() == hundredths


def test_random_masks_stay_outside_the_visual_set() -> None:
    scores = HeadScores(torch.rand(6, 8, generator=torch.Generator().manual_seed(0)))
    drawn = [masked("mask_random", scores, mask_ratio=0.25, seed=seed) for seed in range(40)]
    visual = masked("mask", scores, mask_ratio=0.25)
    for heads in drawn:
        assert heads.shape == (6, 8) and heads.sum() == 12 and not (heads & visual).any()
    union = torch.stack(drawn).any(0)
    assert torch.equal(union, ~visual)  # heads of all layers and all indices are drawn, none is left out
    assert torch.equal(drawn[3], masked("mask_random", scores, mask_ratio=0.25, seed=3))
    assert not torch.equal(drawn[3], drawn[4])


def test_more_random_heads_than_there_are_is_an_error() -> None:
    scores = HeadScores(torch.rand(4, 4))
    assert torch.equal(masked("mask_random", scores, mask_ratio=0.5), ~masked("mask", scores, mask_ratio=0.5))
    with pytest.raises(ConfigError, match="masks 9 random heads.*only 7 of 16 are left"):
        masked("mask_random", scores, mask_ratio=0.6)


def test_other_methods_mask_nothing() -> None:
    scores = HeadScores(torch.rand(2, 4))
    for method in ("fullkv", "snapkv", "adakv", "sparsemm", "random"):
        config = CompressionConfig(method, 64, scores)
        assert not Plan(config, 2, 4, 4).masked_heads.any()


def test_masks_need_scores_of_the_models_shape() -> None:
    config = CompressionConfig("mask", head_scores=HeadScores(torch.rand(2, 4)))
    with pytest.raises(HeadScoreError, match="the model has 4 x 2"):
        Plan(config, 4, 2, 2)
    with pytest.raises(ConfigError, match="needs head_scores"):
        CompressionConfig("mask")


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 13])
@pytest.mark.parametrize("columns", [1, 4, 17, 1031])
def test_pooling_is_that_of_pytorch_bit_for_bit(columns: int, kernel_size: int) -> None:
    scores = torch.rand(2, 3, columns + 2, generator=torch.Generator().manual_seed(columns))[..., :columns]
    before = scores.clone()
    expected = avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
    assert torch.equal(average_pooled(scores, kernel_size), expected) and torch.equal(scores, before)

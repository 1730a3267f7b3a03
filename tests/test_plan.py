"""A configuration resolved for one shape of model: which shapes there are, and what is remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsemm import CompressionConfig, HeadScores
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.plan import Plan


def plan(layers: int = 2, query_heads: int = 4, kv_heads: int = 2, **settings: Any) -> Plan:
    return Plan(
        CompressionConfig(**{"method": "snapkv", "budget": 8, "window_size": 4, **settings}),
        layers,
        query_heads,
        kv_heads,
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 4, 2), "num_layers=0"),
        ((2, 4, 0), "num_kv_heads=0"),
        ((2, 0, 2), "num_query_heads=0 is not a multiple"),
        ((2, -2, 2), "num_query_heads=-2 is not a multiple"),
        ((2, 3, 2), "num_query_heads=3 is not a multiple of num_kv_heads=2"),
    ],
)
def test_shapes_that_no_model_has(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*shape)


def test_the_smallest_model() -> None:
    scores = HeadScores([[1.0]])
    for method in ("fullkv", "snapkv", "pyramidkv", "sparsemm", "random"):
        assert plan(1, 1, 1, method=method, head_scores=scores).budgets(20).tolist() == [
            [20 if method == "fullkv" else 8]
        ]


def test_prompts_have_no_negative_length() -> None:
    assert plan().budgets(0).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ConfigError, match="prompt_length=-1 is negative"):
        plan().budgets(-1)


def test_budgets_of_a_length_are_computed_once_and_shared_by_plans_with_other_slack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = plan(method="pyramidkv", pyramid_beta=2)
    budgets = first.budgets(20)
    assert first.budgets(20) is budgets and first.with_reserve(7).budgets(20) is budgets
    monkeypatch.setattr("sparsemm.plan._REMEMBERED_LENGTHS", 3)
    for length in range(10):  # a chat of many turns does not keep them all
        first.budgets(length)
        assert len(first._budgets) <= 3
    assert torch.equal(first.budgets(20), budgets)


def test_methods_that_want_a_calibration_or_other_heads() -> None:
    with pytest.raises(HeadScoreError, match="needs a calibration"):
        plan(method="rate_distortion", head_scores=HeadScores(torch.rand(2, 4)))
    with pytest.raises(HeadScoreError, match="2 x 4"):
        plan(method="sparsemm", head_scores=HeadScores(torch.rand(2, 8)))

"""Methods of other papers against float64 references written from their equations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import cut_margin

from sparsemm.cache.selection import select_positions
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.plan import head_budgets

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


@pytest.mark.parametrize("method", BASELINES)
def test_budgets_are_exact_and_have_no_release_to_follow(method: str) -> None:
    shape = {"num_layers": 3, "num_query_heads": 4, "num_kv_heads": 2}
    for length in (3, WINDOW, 20, 50):
        rows = head_budgets(CompressionConfig(method, 20, window_size=WINDOW), **shape, prompt_length=length)
        assert (rows == min(20, length)).all()
    with pytest.raises(ConfigError, match=f"rounding='paper'.*'{method}' is none of them"):
        CompressionConfig(method, 20, window_size=WINDOW, rounding="paper")

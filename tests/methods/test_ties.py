"""Ties among more heads than a sort of small arrays would keep in order by chance."""

from __future__ import annotations

import pytest
import torch

import sparsemm
from sparsemm.methods import get_method
from sparsemm.methods.adakv import _counts_in_layer_top
from sparsemm.methods.budgets import largest_fraction_on_device


@pytest.mark.parametrize("shape", [(1, 17), (5, 8), (32, 32)])
def test_rows_left_over_go_to_the_first_heads(shape):
    layers, heads = shape
    scores = torch.ones(shape, dtype=torch.float64)
    scores[-1, -1] = 0  # its share, eight rows, is divided among the others
    settings = sparsemm.CompressionConfig("sparsemm", 40, sparsemm.HeadScores(scores), window_size=32, ratio=0.0)
    rows = sparsemm.head_budgets(
        settings, num_layers=layers, num_query_heads=heads, num_kv_heads=heads, prompt_length=5000
    ).flatten()
    assert int(rows.sum()) == 40 * layers * heads
    more = rows[:-1] - rows[:-1].min()
    over = int(more.sum())
    assert 0 < over < len(more)
    assert more.tolist() == [1] * over + [0] * (len(more) - over)


def test_rows_left_over_inside_a_layer_go_to_its_first_heads():
    rows = largest_fraction_on_device(torch.full((2, 40), 5), 8)
    assert rows.tolist() == [[1] * 25 + [0] * 15] * 2


def test_the_first_heads_are_masked():
    scores = sparsemm.HeadScores(torch.ones(5, 8, dtype=torch.float64))
    settings = sparsemm.CompressionConfig("mask", None, scores, mask_ratio=0.3)
    masked = get_method("mask").masked_heads(settings, settings.head_scores).flatten()
    assert masked.tolist() == [True] * 12 + [False] * 28


def test_of_equal_entries_beside_larger_ones_the_lower_head_takes_no_more_than_are_left() -> None:
    weighted = torch.tensor([[[9.0, 5, 5, 5], [8.0, 5, 5, 5], [1.0, 5, 0, 0]]])
    for top in range(13):
        order = sorted(range(12), key=lambda place: (-weighted.flatten()[place].item(), place))[:top]
        expected = torch.bincount(torch.tensor(order, dtype=torch.long) // 4, minlength=3)[None]
        found = _counts_in_layer_top(weighted, torch.ones_like(weighted, dtype=torch.bool), top)
        assert torch.equal(found, expected), top

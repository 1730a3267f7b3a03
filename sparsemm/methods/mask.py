"""Full cache, with the top visual heads masked (the paper's masking experiment)."""

from __future__ import annotations

import math

import torch
from torch import BoolTensor

from sparsemm.head_scores import HeadScores
from sparsemm.methods.method import Method, Settings


def num_masked_heads(settings: Settings, head_scores: HeadScores) -> int:
    """floor(mask_ratio * L * Hq); the tiny addend keeps 0.29 of 100 heads from becoming 28 in binary arithmetic."""
    return math.floor(settings.mask_ratio * head_scores.values.numel() + 1e-9)


def visual_heads(settings: Settings, head_scores: HeadScores) -> BoolTensor:
    """Bool `[num_layers, num_query_heads]`: the highest-scoring heads, ties to the lower layer, then head."""
    ranking = torch.sort(head_scores.values.flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(head_scores.values.numel(), dtype=torch.bool)
    chosen[ranking[: num_masked_heads(settings, head_scores)]] = True
    return chosen.view_as(head_scores.values)


MASK = Method(name="mask", head_scores="given", masked_heads=visual_heads)

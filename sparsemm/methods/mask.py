"""Full cache, with the top visual heads masked (the paper's masking experiment)."""

from __future__ import annotations

import torch
from torch import BoolTensor

from sparsemm.head_scores import HeadScores, heads_of_share
from sparsemm.methods.method import Method, Settings


def visual_heads(settings: Settings, head_scores: HeadScores) -> BoolTensor:
    """Bool `[num_layers, num_query_heads]`: the highest-scoring heads, ties to the lower layer, then head."""
    ranking = torch.sort(head_scores.values.flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(head_scores.values.numel(), dtype=torch.bool)
    chosen[ranking[: heads_of_share(settings.mask_ratio, chosen.numel())]] = True
    return chosen.view_as(head_scores.values)


MASK = Method(name="mask", head_scores="given", masked_heads=visual_heads)

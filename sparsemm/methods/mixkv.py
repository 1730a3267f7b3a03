"""MixKV: importance mixed with diversity, by how redundant the keys of a head are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsemm.methods.method import Method, PromptStates, Settings
from sparsemm.methods.snapkv import pooled_window_scores, uniform_budgets

_TINY = 1e-8


def importance_and_diversity(settings: Settings, states: PromptStates) -> Tensor:
    """(1 - r) (a + v) + r d in float32, over the columns before the window (Liu et al., "Mixing Importance with
    Diversity", ICLR 2026, arXiv 2510.20707, section 3; scales as in the authors' code).

    a is SnapKV's score. v = ‖value‖₂ and d = -k̂·m, with k̂ = key / ‖key‖₂ and m the mean k̂ of the head, both brought
    to 0 .. 1 over the columns and then to the mean of a. r = (T ‖m‖² - 1) / (T - 1) is the mean cosine between two
    different keys of the head, in closed form. There is nothing to set.

    r is that of the prompt itself: "online" in the paper's Table 4, where it does better than r averaged beforehand
    over other prompts, which the authors' code has.
    """
    return with_diversity(pooled_window_scores(settings, states), states)


def with_diversity(attention: Tensor, states: PromptStates) -> Tensor:
    """`importance_and_diversity` from SnapKV's score, float32 `[batch, num_kv_heads, columns]`."""
    columns, valid = states.columns, states.valid
    before, length = valid[..., :columns], valid.sum(-1, keepdim=True)
    level = _mean(attention, before)
    direction = normalize(states.key.float(), dim=-1) * valid[..., None]
    mean = direction.sum(2, keepdim=True) / length[..., None]
    redundancy = (length * mean.square().sum(-1) - 1) / (length - 1).clamp(min=1)
    diversity = _like(-(direction[:, :, :columns] * mean).sum(-1), before, level)
    strength = _like(states.value[:, :, :columns].float().norm(dim=-1), before, level)
    return (1 - redundancy) * (attention + strength) + redundancy * diversity


def _like(scores: Tensor, valid: Tensor, level: Tensor) -> Tensor:
    """Brought to 0 .. 1 over the valid columns, then to the mean `level`."""
    least = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    largest = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    scores = (scores - least) / (largest - least + _TINY)
    return scores * level / (_mean(scores, valid) + _TINY)


def _mean(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)


MIXKV = Method(
    name="mixkv",
    model_budgets=uniform_budgets,
    score_positions=importance_and_diversity,
    sees=("value",),
    paper_rounding=False,
)

"""The control of `mask`: as many heads, drawn at random among those that `mask` would leave alone."""

from __future__ import annotations

import torch
from torch import BoolTensor

from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.methods.mask import visual_heads
from sparsemm.methods.method import Method, Settings


def random_other_heads(settings: Settings, head_scores: HeadScores) -> BoolTensor:
    """Seeded choice among all (layer, query head) pairs outside the visual set. `[num_layers, num_query_heads]`.

    Raises:
        ConfigError: More heads are to be masked than there are outside the visual set.
    """
    visual = visual_heads(settings, head_scores).flatten()
    candidates = (~visual).nonzero().flatten()
    count = int(visual.sum())
    if count > len(candidates):
        raise ConfigError(
            f"mask_ratio={settings.mask_ratio} masks {count} random heads outside the {count} visual ones, but only "
            f"{len(candidates)} of {visual.numel()} are left; use mask_ratio <= 0.5"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.zeros_like(visual)
    chosen[candidates[torch.randperm(len(candidates), generator=generator)[:count]]] = True
    return chosen.view_as(head_scores.values)


MASK_RANDOM = Method(name="mask_random", head_scores="given", masked_heads=random_other_heads, seeded=True)

"""The method table. A new method is one small file and one entry here (or one call of `register_method`)."""

from __future__ import annotations

import torch
from torch import BoolTensor

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.method import METHODS, Method, get_method, register_method
from sparsemm.methods.adakv import ADAKV
from sparsemm.methods.fullkv import FULLKV
from sparsemm.methods.mask import MASK
from sparsemm.methods.mask_random import MASK_RANDOM
from sparsemm.methods.pyramidkv import PYRAMIDKV
from sparsemm.methods.random import RANDOM
from sparsemm.methods.snapkv import SNAPKV
from sparsemm.methods.sparsemm import SPARSEMM

for _method in (FULLKV, SNAPKV, PYRAMIDKV, ADAKV, SPARSEMM, RANDOM, MASK, MASK_RANDOM):
    register_method(_method)


def masked_query_heads(
    config: CompressionConfig, head_scores: HeadScores | None, num_layers: int, num_query_heads: int
) -> BoolTensor:
    """Bool `[num_layers, num_query_heads]`, True for the query heads that `config.method` masks (spec section 6).

    `head_scores` is what `sparsemm.budgets.resolve_head_scores` returned. All False for methods that mask nothing.
    """
    rule = get_method(config.method).masked_heads
    if rule is None:
        return torch.zeros(num_layers, num_query_heads, dtype=torch.bool)
    if head_scores is None:
        raise ConfigError(f"method={config.method!r} masks heads by score; head_scores is missing")
    head_scores.check_shape(num_layers, num_query_heads)
    return rule(config, head_scores)


__all__ = ["METHODS", "Method", "get_method", "masked_query_heads", "register_method"]

"""Key norms: keys of small norm tend to be those that are attended to."""

from __future__ import annotations

from torch import Tensor

from sparsemm.methods.method import Method, PromptStates, Settings
from sparsemm.methods.snapkv import uniform_budgets


def negative_key_norms(settings: Settings, states: PromptStates) -> Tensor:
    """-‖k‖₂ in float32: keys of the lowest norm are kept (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy
    for KV Cache Compression", EMNLP 2024, arXiv 2406.11430, section 3: those of the highest norm stand for the lowest
    attention in its equation 5). Rotation leaves norms as they are.

    Every layer is compressed, so that budgets compare; the paper's section 4 leaves the first two whole, where norms
    say little about attention.
    """
    return -states.key[:, :, : states.columns].float().norm(dim=-1)


KNORM = Method(name="knorm", model_budgets=uniform_budgets, score_positions=negative_key_norms, paper_rounding=False)

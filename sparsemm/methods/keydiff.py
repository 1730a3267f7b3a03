"""KeyDiff: keys that differ most from the mean key are kept."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparsemm.methods.method import Method, PromptStates, Settings
from sparsemm.methods.snapkv import uniform_budgets


def difference_from_mean_key(settings: Settings, states: PromptStates) -> Tensor:
    """s_i = -cos(mu, k_i) in float32, with mu the mean of all keys k_j / ‖k_j‖ of the head, as the cache holds them
    (Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction", NeurIPS 2025, arXiv 2504.15364, section 3: the form
    with one anchor for the sum of all pairwise similarities). As `sparsemm.methods.method.PositionScorer` says.

    The whole prompt is one block, where the paper evicts after blocks of 128; the window that every method here keeps
    is the paper's variant with a sliding window.
    """
    key = states.key.float()
    # The mean's length does not change a cosine, so the sum will do.
    anchor = (normalize(key, dim=-1) * states.valid[..., None]).sum(2, keepdim=True)
    return -cosine_similarity(key[:, :, : states.columns], anchor, dim=-1)


KEYDIFF = Method(
    name="keydiff", model_budgets=uniform_budgets, score_positions=difference_from_mean_key, paper_rounding=False
)

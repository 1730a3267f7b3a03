"""Expected attention: keys that the queries to come will attend to, as far as those of the prompt tell."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.methods.method import Method, PromptStates, Settings
from sparsemm.methods.snapkv import uniform_budgets
from sparsemm.methods.streaming_llm import NUM_SINKS

POSITIONS_AHEAD = 512
"""Over which the rotation of a query to come is averaged: T of equation 6, as in the paper's section 3.1."""
EPSILON = 0.02
"""Of equation 9; the value of section 3.1, which has 0 for needles in a haystack alone."""


def expected_attention(settings: Settings, states: PromptStates) -> Tensor:
    """(a_i + epsilon) ‖v_i‖₂ in float32, with a the expected attention of tokens to come (Devoto et al., "Expected
    Attention", arXiv 2510.00636, section 2.2, equations 5 to 9).

    Queries before RoPE are taken as normal with the mean mu and the covariance S of the prompt's own, and rotated by R,
    the mean rotation of the next 512 positions (equation 6). A key then has the expected unnormalised weight
    z_i = exp(c k_i·R mu + c² k_i·R S Rᵀ k_i / 2), c the factor of the logits (7); a = z / sum(z) (8), the mean over the
    query heads of a kv head. Equation 9 has ‖W_o v_i‖; its section 3.1 leaves the projection out, for its memory. As in
    the authors' library kvpress, the first four tokens are kept, and count neither among the queries nor in the sum.

    All heads get the same budget; the paper spreads it over a layer's heads as AdaKV does. Beside the states, queries
    are held once more in float32, and twice the keys of every query head.
    """
    key = states.key.float()
    batch, num_kv_heads, seq_len, head_dim = key.shape
    mean, covariance = _queries_to_come(states)
    grouped = (batch, num_kv_heads, -1)
    linear = torch.einsum("bhtd,bhgd->bhgt", key, mean.reshape(*grouped, head_dim))
    covariance = covariance.reshape(*grouped, head_dim, head_dim)
    quadratic = torch.einsum("bhgtd,bhtd->bhgt", torch.einsum("bhtc,bhgcd->bhgtd", key, covariance), key)
    place = torch.arange(seq_len, device=key.device) - states.starts[..., None]
    counted = (place >= NUM_SINKS)[:, :, None]
    logits = states.scaling * linear + states.scaling**2 / 2 * quadratic
    weights = logits.masked_fill(~counted, -torch.inf).softmax(-1).mean(2)
    scores = (weights + EPSILON) * states.value.float().norm(dim=-1)
    return torch.where(place < NUM_SINKS, torch.inf, scores)[..., : states.columns]


def _queries_to_come(states: PromptStates) -> tuple[Tensor, Tensor]:
    """Mean `[batch, num_query_heads, head_dim]` and covariance `[..., head_dim, head_dim]`, rotated."""
    query, num_queries = states.unrotated, states.num_queries[:, None]
    place = torch.arange(query.shape[2], device=query.device) - (query.shape[2] - num_queries)
    whole_prompt = query.shape[2] == states.key.shape[2]
    skipped = (num_queries - 1).clamp(0, NUM_SINKS if whole_prompt else 0)
    counted = (place >= skipped)[:, None, :, None]
    count = counted.sum(2, keepdim=True)
    query = query.masked_fill(~counted, 0.0)
    mean = query.sum(2, keepdim=True) / count
    centred = (query - mean).masked_fill(~counted, 0.0)
    covariance = centred.transpose(2, 3) @ centred / count
    ahead = states.ahead[:, None]
    return (mean @ ahead.transpose(2, 3)).squeeze(2), ahead @ covariance @ ahead.transpose(2, 3)


EXPECTED_ATTENTION = Method(
    name="expected_attention",
    model_budgets=uniform_budgets,
    score_positions=expected_attention,
    sees=("value", "unrotated", "ahead"),
    positions_ahead=POSITIONS_AHEAD,
    paper_rounding=False,
)

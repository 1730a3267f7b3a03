"""How many prompt rows each kv head keeps: the request, the two roundings, and the rule that follows head scores.

Sources: spec section 3; Tables 1 and 2 of the paper are settings of `score_budgets` (its `ratio` and window).
The rules of the other methods are in `sparsemm/methods/`, one file each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor, Tensor

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.method import get_method

# Real targets carry rounding noise of about 1e-11 rows. Fractions are compared after rounding to this many decimals, so
# that heads with equal fractions tie (and go to the lower layer and head) and 6.99999999999 counts as 7.
_FRACTION_DECIMALS = 9


@dataclass(frozen=True)
class BudgetRequest:
    """What a budget rule may look at. One prompt of `prompt_length` valid tokens (padding excluded)."""

    config: CompressionConfig
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    prompt_length: int
    head_scores: HeadScores | None = None


def head_budgets(
    config: CompressionConfig, *, num_layers: int, num_query_heads: int, num_kv_heads: int, prompt_length: int
) -> LongTensor:
    """Rows that each kv head keeps of a prompt, window included: int64 `[num_layers, num_kv_heads]`.

    Args:
        config: Method, budget, rounding and their settings; names the head scores, or the seed that draws them.
        num_layers, num_query_heads, num_kv_heads: Shape of the language model.
        prompt_length: Valid tokens of the prompt, padding excluded.

    Raises:
        ConfigError: The method's budgets depend on attention scores (`adakv`), or a size is out of range.
        HeadScoreError: The head scores do not fit the model.
    """
    for name, value in {"num_layers": num_layers, "num_kv_heads": num_kv_heads}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if num_query_heads < 1 or num_query_heads % num_kv_heads:
        raise ConfigError(f"num_query_heads={num_query_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if prompt_length < 0:
        raise ConfigError(f"prompt_length={prompt_length} is negative; give the number of valid prompt tokens")
    head_scores = resolve_head_scores(config, num_layers, num_query_heads)
    return model_budgets(BudgetRequest(config, num_layers, num_query_heads, num_kv_heads, prompt_length, head_scores))


def model_budgets(request: BudgetRequest) -> LongTensor:
    """`head_budgets` for head scores that are already resolved. Raises `ConfigError` for input-dependent methods."""
    method = get_method(request.config.method)
    if method.layer_budgets is not None:
        raise ConfigError(
            f"the budgets of method={method.name!r} depend on the attention scores of the input; "
            "use sparsemm.select_positions, or read them from handle.stats after a prompt"
        )
    if method.model_budgets is None:
        return torch.full((request.num_layers, request.num_kv_heads), request.prompt_length, dtype=torch.long)
    return method.model_budgets(request)


def resolve_head_scores(config: CompressionConfig, num_layers: int, num_query_heads: int) -> HeadScores | None:
    """The head scores that `config` runs with on a model: given, drawn from its seed, or None if its method needs none.

    Call it once per model. The draw, uniform `[num_layers, num_query_heads]`, depends on the seed and the shape only.

    Raises:
        HeadScoreError: The scores do not fit the model, or their file cannot be used.
    """
    source = get_method(config.method).head_scores
    if source == "none":
        return None
    if source == "random":
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.rand(num_layers, num_query_heads, generator=generator, dtype=torch.float64)
        return HeadScores(drawn, source="seeded uniform draw", seed=config.seed)
    scores = config.head_scores if isinstance(config.head_scores, HeadScores) else HeadScores.load(config.head_scores)
    scores.check_shape(num_layers, num_query_heads)
    return scores


def score_budgets(request: BudgetRequest) -> LongTensor:
    """The rule of `sparsemm` and `random`: window + uniform share + share by head score. `[num_layers, num_kv_heads]`.

    Raises:
        ConfigError: The request carries no head scores.
        HeadScoreError: They do not fit the model.
    """
    config, length = request.config, request.prompt_length
    shape = (request.num_layers, request.num_kv_heads)
    if request.head_scores is None:
        raise ConfigError(f"method={config.method!r} needs head scores; resolve them before asking for budgets")
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    if config.budget >= length and (config.rounding == "exact" or config.budget > length):
        return torch.full(shape, length, dtype=torch.long)

    shares = request.head_scores.normalised().view(*shape, -1).sum(-1).numpy().ravel()
    base = config.budget - config.window_size
    if config.rounding == "paper":
        uniform = int(config.ratio * base)
        # np.rint rounds half to even; what a head may not hold beyond the prompt is lost, as in the release.
        targets = np.round(shares * (shares.size * (base - uniform)) + uniform, _FRACTION_DECIMALS)
        rows = np.minimum(config.window_size + np.rint(targets).astype(np.int64), length)
    else:
        uniform = config.ratio * base
        extra = fill_in_proportion(
            shares, total=shares.size * (base - uniform), limit=length - config.window_size - uniform
        )
        rows = largest_fraction(config.window_size + uniform + extra, total=shares.size * config.budget, limit=length)
    return torch.from_numpy(rows).view(shape)


def fill_in_proportion(shares: np.ndarray, *, total: float, limit: float) -> np.ndarray:
    """Split `total` in proportion to `shares`, nobody above `limit`; float64, same shape `[n]`.

    The result is min(limit, lambda * share) with the one lambda that makes it sum to `total`: what a full entry cannot
    take goes to the others in proportion. When every entry with a positive share is full, the rest is split equally
    among the others. `total <= n * limit` is the caller's to see to.
    """
    order = np.argsort(-shares, kind="stable")
    descending = shares[order]
    positive = int(np.count_nonzero(descending))
    # With the k largest full, the next one gets its part of what the others share: left_k * share / sum of the others.
    # The smallest k for which that is within the limit is the answer; sums run from the small end, for precision.
    others = np.cumsum(descending[:positive][::-1])[::-1]
    left = total - limit * np.arange(len(shares) + 1)
    fits = descending[:positive] / others * left[:positive] <= limit
    full = int(np.argmax(fits)) if fits.any() else positive
    filled = np.full_like(descending, limit)
    if full < positive:
        filled[full:positive] = descending[full:positive] / others[full] * left[full]
        filled[positive:] = 0.0
    elif full < len(shares):
        filled[full:] = left[full] / (len(shares) - full)
    result = np.empty_like(filled)
    result[order] = filled
    return result


def largest_fraction(targets: np.ndarray, *, total: int, limit: int) -> np.ndarray:
    """Round `targets` (float64 `[n]`) to integers that sum to `total`: floor, then +1 by largest fraction.

    Ties go to the lower index; no entry exceeds `limit`. Returns int64 `[n]`.
    """
    snapped = np.round(targets, _FRACTION_DECIMALS)
    rows = np.minimum(np.floor(snapped), limit).astype(np.int64)
    fractions = np.round(snapped - rows, _FRACTION_DECIMALS)
    fractions[rows >= limit] = -1.0
    missing = total - int(rows.sum())
    rows[np.argsort(-fractions, kind="stable")[:missing]] += 1
    return rows


def largest_fraction_on_device(targets: Tensor) -> Tensor:
    """`largest_fraction` along the last axis of float64 `[..., n]`, to the rounded sum of the targets; int64.

    Runs wherever `targets` is, without waiting for the device.
    """
    unit = 10.0**_FRACTION_DECIMALS
    total = targets.sum(-1, keepdim=True).round()
    rows = torch.floor(targets + 0.5 / unit)
    fractions = torch.round((targets - rows) * unit)
    order = fractions.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rows + (rank < total - rows.sum(-1, keepdim=True))).long()

"""What budget rules share: the two roundings, and the rule that follows head scores.

Sources: spec section 3; Tables 1 and 2 of the paper are settings of `score_budgets` (its `ratio` and window).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import LongTensor, Tensor

from sparsemm.errors import ConfigError
from sparsemm.methods.method import BudgetRequest

# Real targets carry rounding noise of about 1e-11 rows. Fractions are compared after rounding to this many decimals, so
# that heads with equal fractions tie (and go to the lower layer and head) and 6.99999999999 counts as 7.
_FRACTION_DECIMALS = 9


def score_budgets(request: BudgetRequest) -> LongTensor:
    """The rule of `sparsemm` and `random`: window + uniform share + share by head score. `[num_layers, num_kv_heads]`.

    Raises:
        ConfigError: The request carries no head scores.
        HeadScoreError: They do not fit the model.
    """
    settings, length = request.settings, request.prompt_length
    shape = (request.num_layers, request.num_kv_heads)
    if request.head_scores is None:
        raise ConfigError("a rule that follows head scores was asked for budgets without any")
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    if settings.budget >= length and (settings.rounding == "exact" or settings.budget > length):
        return torch.full(shape, length, dtype=torch.long)

    shares = request.head_scores.normalised().view(*shape, -1).sum(-1).numpy().ravel()
    base = settings.budget - settings.window_size
    if settings.rounding == "paper":
        uniform = int(settings.ratio * base)
        # np.rint rounds half to even; what a head may not hold beyond the prompt is lost, as in the release.
        targets = np.round(shares * (shares.size * (base - uniform)) + uniform, _FRACTION_DECIMALS)
        rows = np.minimum(settings.window_size + np.rint(targets).astype(np.int64), length)
    else:
        uniform = settings.ratio * base
        extra = fill_in_proportion(
            shares, total=shares.size * (base - uniform), limit=length - settings.window_size - uniform
        )
        rows = largest_fraction(
            settings.window_size + uniform + extra, total=shares.size * settings.budget, limit=length
        )
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

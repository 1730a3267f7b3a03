"""What budget rules share: the two roundings, and the rule that follows head scores.

Sources: spec section 3; Tables 1 and 2 of the paper are settings of `score_budgets` (its `ratio` and window).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import LongTensor, Tensor

from sparsemm.errors import ConfigError
from sparsemm.methods.method import BudgetRequest

# Under `paper`, real targets carry rounding noise of about 1e-11 rows: 6.49999999999 counts as 6.5 after rounding to so
# many decimals. `exact` needs no such thing, it computes in whole numbers.
_PAPER_DECIMALS = 9


def score_budgets(request: BudgetRequest) -> LongTensor:
    """The rule of `sparsemm` and `random`: window + uniform share + share by head score. `[num_layers, num_kv_heads]`.

    Raises:
        ConfigError: The request carries no head scores.
        HeadScoreError: They do not fit the model.
    """
    settings = request.settings
    if request.head_scores is None:
        raise ConfigError("a rule that follows head scores was asked for budgets without any")
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    if settings.rounding == "paper" and settings.budget <= request.prompt_length:
        return torch.from_numpy(_paper_rows(request)).view(request.num_layers, request.num_kv_heads)
    return follow_scores(request, request.head_scores.values, decimal_fraction(settings.ratio))


def follow_scores(request: BudgetRequest, scores: Tensor, ratio: Fraction) -> LongTensor:
    """Window, a uniform share `ratio` of the rest, and the others by `scores` `[num_layers, num_query_heads]`: int64
    `[num_layers, num_kv_heads]`, rounded as `exact` says."""
    settings, length = request.settings, request.prompt_length
    shape = (request.num_layers, request.num_kv_heads)
    if settings.budget >= length:
        return torch.full(shape, length, dtype=torch.long)
    shares = whole_shares(scores.view(shape[0] * shape[1], -1).tolist())
    base = settings.budget - settings.window_size
    uniform = ratio * base
    extra, unit = fill_in_proportion(
        shares, total=len(shares) * (base - uniform), limit=length - settings.window_size - uniform
    )
    least = int((settings.window_size + uniform) * unit)
    rows = largest_fraction([least + part for part in extra], unit, total=len(shares) * settings.budget)
    return torch.tensor(rows).view(shape)


def _paper_rows(request: BudgetRequest) -> np.ndarray:
    """As the release rounds: int64 `[num_layers * num_kv_heads]`."""
    settings = request.settings
    shares = request.head_scores.normalised().view(request.num_layers * request.num_kv_heads, -1).sum(-1).numpy()
    base = settings.budget - settings.window_size
    uniform = int(settings.ratio * base)
    # np.rint rounds half to even; what a head may not hold beyond the prompt is lost, as in the release.
    targets = np.round(shares * (shares.size * (base - uniform)) + uniform, _PAPER_DECIMALS)
    return np.minimum(settings.window_size + np.rint(targets).astype(np.int64), request.prompt_length)


def decimal_fraction(value: float) -> Fraction:
    """The number a person typed, not its binary neighbour: 0.1 is 1/10. Denominators stay below a thousand million, so
    that products with row counts fit int64."""
    return Fraction(str(value)).limit_denominator(10**9)


def whole_shares(groups: Sequence[Sequence[float]]) -> list[int]:
    """Whole numbers in the exact proportion of the groups' sums: no float is rounded, so only equal sums are equal."""
    ratios = [[value.as_integer_ratio() for value in group] for group in groups]
    unit = max(denominator for group in ratios for _, denominator in group)  # powers of two: the largest fits all
    return [sum(numerator * (unit // denominator) for numerator, denominator in group) for group in ratios]


def fill_in_proportion(shares: Sequence[int], *, total: Fraction, limit: Fraction) -> tuple[list[int], int]:
    """Split `total` in proportion to `shares`, nobody above `limit`: numerators `[n]`, and their common denominator, a
    multiple of that of `limit`.

    The result is min(limit, lambda * share) with the one lambda that makes it sum to `total`: what a full entry cannot
    take goes to the others in proportion. When every entry with a positive share is full, the rest is split equally
    among the others. `total <= n * limit` is the caller's to see to.
    """
    unit = total.denominator * limit.denominator
    left, limit_units = int(total * unit), int(limit * unit)
    full: set[int] = set()
    others = sum(shares)
    for index in sorted(range(len(shares)), key=lambda index: -shares[index]):
        # The largest of those that are left: if its part is within the limit, so are all of theirs.
        if not shares[index] or left * shares[index] <= limit_units * others:
            break
        full.add(index)
        left -= limit_units
        others -= shares[index]
    if not others:
        shares = [1] * len(shares)
        others = max(len(shares) - len(full), 1)
    filled = [limit_units * others if index in full else left * share for index, share in enumerate(shares)]
    return filled, unit * others


def largest_fraction(numerators: Sequence[int], denominator: int, *, total: int) -> list[int]:
    """Round `numerators / denominator`, which sum to `total`, to whole numbers that do: floor, then +1 by largest
    fraction, compared exactly. Ties go to the lower index."""
    rows, fractions = map(list, zip(*(divmod(value, denominator) for value in numerators), strict=True))
    by_fraction = sorted(range(len(rows)), key=lambda index: -fractions[index])
    for index in by_fraction[: total - sum(rows)]:
        rows[index] += 1
    return rows


def largest_fraction_on_device(numerators: Tensor, denominator: int) -> Tensor:
    """`largest_fraction` along the last axis of int64 `[..., n]`, to the rounded sum of the targets; int64.

    Runs wherever `numerators` is, without waiting for the device.
    """
    total = (numerators.sum(-1, keepdim=True) + denominator // 2) // denominator
    rows = numerators // denominator
    order = (numerators % denominator).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return rows + (rank < total - rows.sum(-1, keepdim=True))

"""Independent references for scores, budgets and kept positions: plain Python and float64, exact rationals for budgets.

Written from the formulas, not from the library: nothing of `sparsemm` is imported. Slow and obvious on purpose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kept:
    """Kept columns of each kv head, and the smallest relative margin of any cut that decided them."""

    positions: list[list[int]]
    margin: float


def fraction(value: float) -> Fraction:
    """The decimal number a person typed, not its binary neighbour: 0.1 is 1/10."""
    return Fraction(str(value))


# -- position scores (spec section 2) ----------------------------------------------------------------------------------


def pooled_scores(
    query: np.ndarray, key: np.ndarray, window: int, kernel: int, scaling: float | None = None
) -> np.ndarray:
    """query [Hq, n, D], the last n <= T queries, and key [Hkv, T, D], no padding -> [Hkv, max(0, T - window)].

    `scaling` is the factor of the logits, 1 / sqrt(D) when None.
    """
    query, key = query.astype(np.float64), key.astype(np.float64)
    num_query_heads, num_queries, head_dim = query.shape
    scaling = 1 / math.sqrt(head_dim) if scaling is None else scaling
    num_kv_heads, length = key.shape[:2]
    group = num_query_heads // num_kv_heads
    before = max(0, length - window)
    counted = min(window, num_queries)
    scores = np.zeros((num_kv_heads, before))
    for head in range(num_query_heads):
        for back in range(1, counted + 1):
            seen = key[head // group, : length - back + 1]
            logits = scaling * (seen @ query[head, num_queries - back])
            weights = np.exp(logits - logits.max())
            scores[head // group] += (weights / weights.sum())[:before] / (counted * group)
    pooled = np.zeros_like(scores)
    reach = kernel // 2
    for column in range(before):
        pooled[:, column] = scores[:, max(0, column - reach) : column + reach + 1].sum(axis=1) / kernel
    return pooled


# -- budgets (spec section 3) ------------------------------------------------------------------------------------------


def round_by_largest_fraction(targets: list[Fraction], total: int) -> list[int]:
    rows = [math.floor(target) for target in targets]
    ranking = sorted(range(len(targets)), key=lambda i: (-(targets[i] - rows[i]), i))
    missing = total - sum(rows)
    assert 0 <= missing <= len(rows), "a reference that does not add up"
    for i in ranking[:missing]:
        rows[i] += 1
    return rows


def score_targets(scores: list[Fraction], budget: int, window: int, ratio: Fraction, length: int) -> list[Fraction]:
    """min(T, w + r + lambda * s): heads that overflow are filled one round after another."""
    count = len(scores)
    uniform = ratio * (budget - window)
    limit = length - window - uniform
    extra: list[Fraction | None] = [None] * count
    while True:
        left = count * (budget - window - uniform) - sum(value for value in extra if value is not None)
        open_heads = [i for i in range(count) if extra[i] is None]
        mass = sum(scores[i] for i in open_heads)
        if mass == 0:
            for i in open_heads:
                extra[i] = left / len(open_heads)
            break
        over = [i for i in open_heads if left * scores[i] / mass > limit]
        if not over:
            for i in open_heads:
                extra[i] = left * scores[i] / mass
            break
        for i in over:
            extra[i] = limit
    return [window + uniform + value for value in extra]


def score_budgets(
    scores: np.ndarray, num_kv_heads: int, budget: int, window: int, ratio: float, length: int, rounding: str
) -> np.ndarray:
    """Rows [L, Hkv] of `sparsemm` (and of `random`, given its scores [L, Hq])."""
    num_layers, num_query_heads = scores.shape
    group = num_query_heads // num_kv_heads
    summed = [
        sum(Fraction(float(scores[layer, head * group + j])) for j in range(group))
        for layer in range(num_layers)
        for head in range(num_kv_heads)
    ]
    count = num_layers * num_kv_heads
    if rounding == "exact":
        if budget >= length:
            rows = [length] * count
        else:
            targets = score_targets(summed, budget, window, fraction(ratio), length)
            rows = round_by_largest_fraction(targets, budget * count)
    elif budget - window > length - window:
        rows = [length] * count
    else:
        uniform = int(ratio * (budget - window))
        whole = sum(summed)
        shares = [count * (budget - window - uniform) * score / whole for score in summed]
        rows = [min(length, window + round(share + uniform)) for share in shares]  # round() of a Fraction: half to even
    return np.array(rows).reshape(num_layers, num_kv_heads)


def pyramid_budgets(num_layers: int, budget: int, window: int, beta: int, length: int, rounding: str) -> list[int]:
    """Rows of each layer; every head of a layer keeps as many."""
    if num_layers == 1:
        return [min(budget, length)]
    if rounding == "exact" and budget >= length:
        return [length] * num_layers
    base = budget - window
    low = base // beta
    high = 2 * base - low
    if high >= length - window:
        high = length - window
        low = 2 * base - high
    if rounding == "paper":
        step = (high - low) // (num_layers - 1)
        return [min(length, window + high - layer * step) for layer in range(num_layers)]
    targets = [window + high - layer * Fraction(high - low, num_layers - 1) for layer in range(num_layers)]
    return round_by_largest_fraction(targets, num_layers * budget)


def lower_hull(rows: list[int], errors: list[float]) -> Callable[[int], float]:
    """The largest convex function below the points that never rises, by every pair of them; from rows[0] upwards."""

    def hull(at: int) -> float:
        below = [error for row, error in zip(rows, errors, strict=True) if row <= at]
        pairs = itertools.combinations(range(len(rows)), 2)
        lines = [
            errors[i] + (errors[j] - errors[i]) * (at - rows[i]) / (rows[j] - rows[i])
            for i, j in pairs
            if rows[i] <= at <= rows[j]
        ]
        return min([*below, *lines])

    return hull


def rate_distortion_budgets(
    sensitivities: np.ndarray, distortions: np.ndarray, rows: list[int], num_kv_heads: int, budget: int, window: int,
    length: int,
) -> np.ndarray:  # fmt: skip
    """Rows [L, Hkv], handed out one at a time to the head whose hull falls most; equally once none falls."""
    errors = (sensitivities[..., None] * distortions).reshape(len(sensitivities) * num_kv_heads, -1, len(rows)).sum(1)
    hulls = [lower_hull(rows, list(curve)) for curve in errors]
    steps = [{row: hull(row) - hull(row + 1) for row in range(rows[0], length)} for hull in hulls]
    kept, extra = [min(window, length)] * len(hulls), [0] * len(hulls)
    for _ in range((min(budget, length) - kept[0]) * len(hulls)):
        open_heads = [head for head in range(len(hulls)) if kept[head] < length]
        # The saving of a row is known to about fifteen digits: equal ones must not be told apart.
        best = max(steps[head][kept[head]] for head in open_heads)
        if best > 1e-14:
            chosen = min(head for head in open_heads if steps[head][kept[head]] >= best * (1 - 1e-9))
        else:
            chosen = min(open_heads, key=lambda head: (extra[head], head))
            extra[chosen] += 1
        kept[chosen] += 1
    return np.array(kept).reshape(len(sensitivities), num_kv_heads)


def adakv_budgets(
    pooled: np.ndarray, budget: int, window: int, floor: float, length: int, rounding: str
) -> tuple[list[int], float]:
    """Rows of each head of one layer from its pooled scores [Hkv, T - w], and the margin of the layer's cut."""
    num_kv_heads = pooled.shape[0]
    if budget > length or (rounding == "exact" and budget == length):
        return [length] * num_kv_heads, math.inf
    base = budget - window
    weighted = []
    for head in range(num_kv_heads):
        descending = sorted(pooled[head], reverse=True)
        share = math.fsum(descending[:base]) / math.fsum(descending) if descending else 0.0
        weighted += [(value * share, head) for value in descending]
    weighted.sort(key=lambda entry: -entry[0])
    counts = [0] * num_kv_heads
    for _, head in weighted[: num_kv_heads * base]:
        counts[head] += 1
    margin = cut_margin([value for value, _ in weighted], num_kv_heads * base)
    if rounding == "paper":
        extra = [round((1 - fraction(floor)) * count + int(floor * base)) for count in counts]
    else:
        targets = [(1 - fraction(floor)) * count + fraction(floor) * base for count in counts]
        extra = round_by_largest_fraction(targets, num_kv_heads * base)
    return [window + value for value in extra], margin


# -- kept positions ----------------------------------------------------------------------------------------------------


def cut_margin(descending: list[float], taken: int) -> float:
    """Relative distance of the last value taken from the first one left; infinite when there is no cut."""
    if taken <= 0 or taken >= len(descending):
        return math.inf
    return (descending[taken - 1] - descending[taken]) / abs(descending[taken - 1])


def top_positions(pooled: np.ndarray, rows: list[int], window: int, length: int) -> Kept:
    """The best rows[h] - w columns before the window, and the window, of each head."""
    before = pooled.shape[1]
    positions, margin = [], math.inf
    for head, count in enumerate(rows):
        beyond = count - (length - before)
        ranking = sorted(range(before), key=lambda column: (-pooled[head, column], column))
        positions.append(sorted(ranking[:beyond]) + list(range(before, length)))
        margin = min(margin, cut_margin([pooled[head, column] for column in ranking], beyond))
    return Kept(positions, margin)


def kept_positions(
    query: np.ndarray,
    key: np.ndarray,
    *,
    method: str,
    budget: int,
    window: int,
    kernel: int = 5,
    rounding: str = "exact",
    layer_idx: int = 0,
    num_layers: int = 1,
    scores: np.ndarray | None = None,
    curves: tuple[np.ndarray, np.ndarray, list[int]] | None = None,
    ratio: float = 0.1,
    floor: float = 0.2,
    beta: int = 20,
    scaling: float | None = None,
) -> Kept:
    """Kept columns of every kv head for one unpadded prompt: query [Hq, T, D], key [Hkv, T, D], scores [L, Hq]."""
    num_kv_heads, length = key.shape[:2]
    pooled = pooled_scores(query, key, window, kernel, scaling)
    margin = math.inf
    if method == "snapkv":
        rows = [min(budget, length)] * num_kv_heads
    elif method == "pyramidkv":
        rows = [pyramid_budgets(num_layers, budget, window, beta, length, rounding)[layer_idx]] * num_kv_heads
    elif method == "adakv":
        rows, margin = adakv_budgets(pooled, budget, window, floor, length, rounding)
    elif method == "rate_distortion":
        rows = rate_distortion_budgets(*curves, num_kv_heads, budget, window, length)[layer_idx].tolist()
    elif method in ("sparsemm", "random"):
        table = score_budgets(scores, num_kv_heads, budget, window, ratio, length, rounding)
        rows = table[layer_idx].tolist()
    else:
        rows = [length] * num_kv_heads
    kept = top_positions(pooled, rows, window, length)
    return Kept(kept.positions, min(margin, kept.margin))


def kept_by(settings: Any, query: Any, key: Any, **more: Any) -> Kept:
    """`kept_positions` of tensors, with the settings of a compression configuration and what they do not say."""
    named = {"window": "window_size", "kernel": "kernel_size", "floor": "adakv_floor", "beta": "pyramid_beta"}
    named |= {name: name for name in ("method", "budget", "rounding", "ratio")}
    given = {name: getattr(settings, attribute) for name, attribute in named.items()}
    return kept_positions(query.double().numpy(), key.double().numpy(), **given, **more)

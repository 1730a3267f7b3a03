"""What is reported of repeated measurements: median, quartiles, and whether they agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

Spread = dict[str, float]
"""A timing as JSON: `median`, quartiles `q25` and `q75`, and `count` of measurements."""

NOISY = 0.5
"""Where the quartiles lie further apart than this share of the median, a timing says little."""


def spread_of(values: Sequence[float]) -> Spread:
    """Median, quartiles (inclusive: of one value all three are that value) and number of the values, at least one."""
    q25, median, q75 = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75, "count": len(values)}


def is_noisy(spreads: Iterable[Spread | None]) -> bool:
    """Whether any of them is too wide to be kept."""
    return any(each is not None and each["q75"] - each["q25"] > NOISY * each["median"] for each in spreads)


def show_spread(spread: Spread | None, digits: int = 2, scale: float = 1) -> str:
    """`2.31 (2.20–2.45)`: median and quartiles, `noisy` behind them where they are; nothing of nothing."""
    if spread is None:
        return ""
    median, q25, q75 = (f"{scale * spread[name]:.{digits}f}" for name in ("median", "q25", "q75"))
    return f"{median} ({q25}–{q75})" + (" noisy" if is_noisy([spread]) else "")

"""Timings: taking turns, warming up, and what is reported of repeated measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Spread = dict[str, float]
"""A timing as JSON: `median`, quartiles `q25` and `q75`, and `count` of measurements."""


def spread_of(values: Sequence[float]) -> Spread:
    """Median, quartiles (inclusive: of one value all three are that value) and number of the values, at least one."""
    q25, median, q75 = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75, "count": len(values)}


def take_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1, wait: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every way in every round. The ways take turns, so that what disturbs one disturbs the others.

    Args:
        ways: What to time, by name.
        rounds: Rounds timed.
        warmup: Rounds before them, which are not.
        wait: Returns when the device has done what it was asked to; called around every timing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warmup + rounds):
        for name, run in ways.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[warmup:] for name, values in seconds.items()}

"""What every benchmark here writes: cells of times and figures in one form of file, each in it as soon as it ends."""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparsemm.decoding.clock import Clock
from sparsemm.errors import ConfigError
from sparsemm.models.parallel import joined
from sparsemm.runs.results import Run, RunFile, environment
from sparsemm.runs.spread import Spread, is_noisy, spread_of

logger = logging.getLogger(__name__)

Times = dict[str, list[float]]
"""Seconds measured, by what took them."""

Tell = Callable[[str], None]

OK = "ok"


@dataclass(frozen=True)
class BenchCell(Run):
    """One point of a benchmark's grid.

    Attributes:
        place: What was measured: operation or kind, method, prompt, ...
        status: "ok", or in words why there are no figures.
        times: Seconds, by what took them.
        figures: Everything else that was measured or counted.
    """

    place: dict[str, Any]
    status: str = OK
    times: dict[str, Spread] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str]:
        return place_key(self.place)

    @property
    def noisy(self) -> bool:
        return is_noisy(self.times.values())

    def ms(self, name: str) -> float:
        """Median milliseconds of `name`."""
        return 1000 * self.times[name]["median"]


class BenchResults(RunFile[BenchCell]):
    """The cells of one benchmark; its settings name it."""

    FORMAT = "sparsemm-benchmark"
    SUBJECT = "a benchmark"
    RUN = BenchCell
    LISTED = "cells"


def check_axes(axes: Mapping[str, Sequence[int | None]]) -> None:
    """Raise `ConfigError` for an empty axis of a grid, or a number below 1 (None stands for no limit)."""
    for name, values in axes.items():
        if not values:
            raise ConfigError(f"{name} is empty; give whole numbers separated by commas")
        wrong = [value for value in values if value is not None and value < 1]
        if wrong:
            raise ConfigError(f"{name} holds {wrong[0]}; give whole numbers of at least 1")


def place_key(place: dict[str, Any]) -> tuple[str]:
    """What tells cells apart, whatever the order of the names."""
    return (json.dumps(place, sort_keys=True),)


def run_benchmark(
    name: str,
    places: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any], Tell], tuple[Times, dict[str, Any]]],
    *,
    device: torch.device,
    settings: dict[str, Any],
    output: Path | None = None,
    fresh: bool = False,
    time_limit: float | None = None,
    progress: bool = True,
    expect: Callable[[dict[str, Any]], float] | None = None,
    report: Tell = logger.info,
) -> BenchResults:
    """Measure the places that `output` does not hold yet, or holds noisily; each finished one is in the file at once.

    What does not fit into memory, or cannot be run here (`ConfigError`), becomes a cell that says so.

    Args:
        name: Of the benchmark.
        places: Points of its grid.
        measure: Seconds and figures of a place; may tell what it is doing, for the progress bar.
        device: Its memory is given back after every cell.
        settings: What cells of one file have to agree in; what is in "environment" may differ.
        output: Result file (JSON).
        fresh: Forget what it holds.
        time_limit: Seconds after which no further cell is begun; the next run with the same settings goes on.
        progress: Show a progress bar.
        expect: About how many seconds a place takes here; reported before the first.
        report: Called with what is going to be done.

    Raises:
        DataError: `output` holds results of other settings.
    """
    place = {**environment(device), **settings.get("environment", {})}
    results = BenchResults.open(output, {"benchmark": name, **settings, "environment": place}, fresh=fresh)
    if not joined().first:
        results.path = None  # one of the processes that hold the model writes
    by_key = {place_key(each): each for each in places}
    missing = results.missing(by_key)
    if not missing:
        report(f"nothing is left to do: {output} holds all {len(by_key)} cells")
    elif expect is not None:
        seconds = [expect(by_key[key]) for key in missing]
        each = " to ".join(dict.fromkeys(map(duration, (min(seconds), max(seconds)))))
        report(
            f"{len(missing)} of {len(by_key)} cells to measure, about {each} each on this device, "
            f"{duration(sum(seconds))} in all"
        )
    began = time.monotonic()
    with tqdm(missing, unit="cell", disable=not progress) as bar:
        for key in bar:
            if time_limit is not None and time.monotonic() - began > time_limit:
                break
            bar.set_description(" ".join(str(value) for value in by_key[key].values() if value is not None))
            try:
                times, figures = measure(by_key[key], _throttled(bar.set_postfix_str))
                spreads = {what: spread_of(values) for what, values in times.items()}
                cell = BenchCell(by_key[key], OK, spreads, figures)
            except torch.cuda.OutOfMemoryError:
                cell = BenchCell(by_key[key], "out of memory")
            except ConfigError as error:  # a baseline that is not installed, a budget below the window
                cell = BenchCell(by_key[key], str(error))
            release_memory(device)
            results.add(cell)
    noisy = sum(cell.noisy for cell in results.runs)
    if noisy:
        report(f"{noisy} of {len(results.runs)} cells are noisy; the next run measures them again")
    return results


def duration(seconds: float) -> str:
    """In words, roughly: `1 s`, `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _throttled(tell: Tell, pause: float = 0.2) -> Tell:
    """Passes on what is told at most every `pause` seconds."""
    last = 0.0

    def sometimes(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > pause:
            tell(text)
            last = time.monotonic()

    return sometimes


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, warmup: int = 1) -> Times:
    """Seconds of every way in every round behind `warmup` others. The ways take turns, so that what disturbs one
    disturbs the others; the device has done what one asks of it before the next begins."""
    seconds: Times = {name: [] for name in ways}
    for _ in range(warmup + rounds):
        for name, run in ways.items():
            clock = Clock(device)
            run()
            clock.mark()
            seconds[name] += clock.seconds()
    return {name: values[warmup:] for name, values in seconds.items()}


def ratio_of(times: Times, name: str, other: str) -> float:
    """Median of the ratios within a round: what slows one slows its neighbours."""
    return statistics.median(own / beside for own, beside in zip(times[name], times[other], strict=True))


def release_memory(device: torch.device) -> None:
    """Give back what finished runs held on a GPU; a CPU's peak is not measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

"""The figures the paper printed (paper.json), and how each benchmark's score is read from lmms-eval's results."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm.io import read_json

DATA = Path(__file__).with_name("paper.json")


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval and the number it is judged by.

    Attributes:
        name: As the paper calls it.
        task: lmms-eval's name.
        metric: Key of lmms-eval's results.
        unit: Of the figures printed.
        scale: Printed figure = lmms-eval's value * scale.
        digits: Decimals printed.
    """

    name: str
    task: str
    metric: str
    unit: str
    scale: float = 1
    digits: int = 4


_OFFLINE = (
    Benchmark("Document reading", "sparsemm_read", "accuracy", "character accuracy", digits=3),
    Benchmark("Field question", "sparsemm_field", "accuracy", "character accuracy", digits=3),
)
"""This repository's own tasks, which the paper knows nothing of."""


@functools.cache
def paper() -> dict[str, Any]:
    """The content of paper.json."""
    return read_json(DATA)


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """By lmms-eval's task name: those of the paper, then the offline ones."""
    known = [Benchmark(name, **values) for name, values in paper()["benchmarks"].items()]
    return {each.task: each for each in (*known, *_OFFLINE)}


def benchmark_of(task: str, metrics: dict[str, float] | None = None) -> Benchmark:
    """The entry of `task`; for a task of no table its first metric, as it is."""
    if task in benchmarks():
        return benchmarks()[task]
    metric = next(iter(metrics), "score") if metrics else "score"
    return Benchmark(task, task, metric, metric)


def paper_model(model: str) -> str | None:
    """The paper's name of a checkpoint folder or hub id, None for models it did not measure."""
    return paper()["models"].get(Path(model).name.lower())


def main_figure(benchmark: str, model: str, method: str, budget: int) -> float | None:
    """Tables 3 and 4: the printed figure, None where there is none."""
    data = paper()
    found = data["table_3"]["by_benchmark"].get(benchmark, {}).get(model)
    if found is None and model == data["table_4"]["model"]:
        found = data["table_4"]["by_benchmark"].get(benchmark)
    return (found or {}).get(method, {}).get(str(budget))

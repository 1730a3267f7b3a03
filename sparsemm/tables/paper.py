"""The figures the paper printed (paper.json), and how each benchmark's score is read from lmms-eval's results."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm.io import read_json

DATA = Path(__file__).with_name("paper.json")

ALL_TABLES = ("1", "2", "3", "4")


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


def printed(number: str, benchmark: str, model: str, budget: int | None = None) -> dict[str, dict[str, float]]:
    """One part of a table as the paper has it, by row and column; empty where it has none.

    Rows are methods, in Table 2 parts of the cache; columns are budgets, in Table 1 ratios (of one `budget`).
    """
    table = paper()[f"table_{number}"]
    if number == "1":
        found = table["by_ratio"].get(model) if (benchmark, budget) == (table["benchmark"], table["budget"]) else None
        return {} if found is None else {table["method"]: found}
    if number == "2":
        return table["by_parts"] if (benchmark, model) == (table["benchmark"], table["model"]) else {}
    if number == "3":
        return table["by_benchmark"].get(benchmark, {}).get(model, {})
    return table["by_benchmark"].get(benchmark, {}) if model == table["model"] else {}


def printed_places(number: str) -> list[tuple[str, str, int | None]]:
    """(model, benchmark, budget) of every part of a table, in the paper's order; a budget in Table 1 only."""
    table = paper()[f"table_{number}"]
    if number == "1":
        return [(model, table["benchmark"], table["budget"]) for model in table["by_ratio"]]
    models = [table["model"]] if "model" in table else list(dict.fromkeys(paper()["models"].values()))
    names = [table["benchmark"]] if number == "2" else list(table["by_benchmark"])
    return [(model, name, None) for name in names for model in models]

"""From measurements to tables: each measured cell beside the paper's figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from sparsemm.errors import ConfigError
from sparsemm.methods import get_method
from sparsemm.miniatures.architectures import FAMILIES
from sparsemm.runs.plots import LABELS
from sparsemm.tables.measurements import Measurement
from sparsemm.tables.paper import (
    ALL_TABLES,
    Benchmark,
    benchmark_of,
    benchmarks,
    paper_model,
    printed,
    printed_places,
)

PARTS = {
    "window": "Local window",
    "window+uniform": "Local window, uniform",
    "window+uniform+score": "Local window, uniform, score-preferred",
}
FULL = "all rows"


@dataclass(frozen=True)
class Entry:
    """One cell: what was measured and what the paper printed, both in the benchmark's unit; None where absent.

    The standard error is that over the documents; of the mean over several seeds, with what these differ by.
    """

    measured: float | None = None
    paper: float | None = None
    effective_budget: float | None = None
    failed: bool = False
    standard_error: float | None = None

    @property
    def difference(self) -> float | None:
        """Measured - paper."""
        return None if self.measured is None or self.paper is None else self.measured - self.paper

    @property
    def is_empty(self) -> bool:
        return self.measured is None and self.paper is None and not self.failed


@dataclass(frozen=True)
class Table:
    """Entries by row and column.

    Attributes:
        number: "1" to "4" as in the paper; benchmarks it does not have stand with "3".
        title: Of this part: one benchmark and model.
        benchmark: What the entries measure.
        model: The model, as it was named.
        columns: Budgets, or ratios in Table 1.
        rows: By method, in Table 2 by part of the cache.
        notes: How the cells were measured.
        variant: What tells a part from others of its benchmark and model: the window, where there were several.
    """

    number: str
    title: str
    benchmark: Benchmark
    model: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Entry]]
    notes: tuple[str, ...] = ()
    variant: str = ""

    @property
    def corner(self) -> str:
        """What stands above the rows' labels."""
        return {"1": "ratio", "2": "cache"}.get(self.number, "budget")

    def entry(self, row: str, column: str) -> Entry:
        return self.rows.get(row, {}).get(column, Entry())


def row_label(row: str) -> str:
    """A row as tables show it."""
    return PARTS.get(row) or LABELS.get(row, row)


def build_tables(
    measurements: Sequence[Measurement],
    *,
    numbers: Iterable[str] = ALL_TABLES,
    ratio: float = 0.1,
    metric: str | None = None,
    whole: bool = False,
) -> list[Table]:
    """The paper's tables, in order, and in the same form whatever else was measured.

    Args:
        measurements: From `read_measurements`.
        numbers: Which of Tables 1 to 4; benchmarks of no table come with 3.
        ratio: The share of SparseMM's (and random's) budget that all heads get alike, in Tables 2 to 4.
        metric: Another metric than the paper's, by lmms-eval's name, for the tasks that have it.
        whole: Also the parts of which nothing was measured.

    Raises:
        ConfigError: There is no such table, no cell has the metric, or `ratio` lies outside of 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"ratio={ratio} is out of range; it must lie between 0 and 1")
    known = {name for m in measurements for name in m.metrics}
    if metric is not None and known and metric not in known:
        raise ConfigError(f"metric={metric!r} is in none of the results; they have {', '.join(sorted(known))}")
    numbers = list(numbers)
    if unknown := [number for number in numbers if number not in ALL_TABLES]:
        raise ConfigError(f"table {unknown[0]!r} is unknown; use {', '.join(ALL_TABLES)}")
    tables = [table for n in ALL_TABLES if n in numbers for table in _parts(n, measurements, ratio, metric)]
    return [table for table in tables if whole or _was_measured(table)]


def _was_measured(table: Table) -> bool:
    return any(entry.measured is not None or entry.failed for row in table.rows.values() for entry in row.values())


def _parts(number: str, measurements: Sequence[Measurement], ratio: float, metric: str | None) -> Iterator[Table]:
    """Every part of one table: the paper's, then others that were measured."""
    cells: dict[tuple[str, str, int | None], list[Measurement]] = {place: [] for place in printed_places(number)}
    others: dict[tuple[str, str, int | None], list[Measurement]] = {}
    for m in measurements:
        if _row(number, m, ratio):
            name = benchmark_of(m.task, m.metrics).name
            place = (paper_model(m.model) or m.model, name, m.budget if number == "1" else None)
            (cells if place in cells else others).setdefault(place, []).append(m)
    ordered = sorted(others, key=lambda place: (_rank(FAMILIES, place[0]), _rank(_NAMES, place[1]), place[2]))
    cells |= {place: others[place] for place in ordered if _is_part(number, place[1], others[place], ratio)}
    for place, here in cells.items():
        for window, chosen in _by_window(here):
            rows: dict[tuple[str, str], list[Measurement]] = {}  # several where something is drawn by a seed
            for m in chosen:
                rows.setdefault((_row(number, m, ratio), _column(number, m)), []).append(m)
            if number != "2" or not window or any(row == "window+uniform" for row, _ in rows):
                yield _table(number, place, rows, metric, window)


_NAMES = [each.name for each in benchmarks().values()]


def _rank(known: Sequence[str], name: str) -> tuple[int, str]:
    """Known names in their order, then others by the alphabet."""
    return (known.index(name) if name in known else len(known), name)


def _row(number: str, m: Measurement, ratio: float) -> str | None:
    """The row of a table that a cell stands in; None where it has no place there."""
    window_only = m.budget is not None and m.budget == m.window_size  # Table 2's first row: no row but the window's
    if number == "1":
        return m.method if m.method == "sparsemm" and not window_only else None
    if number == "2":
        if m.method != "sparsemm" or m.budget is None:
            return None
        return "window" if window_only else {1.0: "window+uniform", ratio: "window+uniform+score"}.get(m.ratio)
    other_ratio = m.method in ("sparsemm", "random") and (m.ratio != ratio or window_only)
    return None if other_ratio else m.method


def _column(number: str, m: Measurement) -> str:
    if number == "1":
        return f"{m.ratio:g}"
    return FULL if m.budget is None else str(m.budget)


def _is_part(number: str, benchmark: str, cells: Sequence[Measurement], ratio: float) -> bool:
    """Whether cells of a place that the paper's table does not have make a part of it."""
    if number == "1":  # two ratios are no sweep where they are the two of Table 2
        return bool({m.ratio for m in cells} - {ratio, 1.0})
    if number == "2":
        return any(_row(number, m, ratio) == "window" for m in cells)
    own, *both = ({name for _, name, _ in printed_places(each)} for each in (number, "3", "4"))
    return benchmark in own or (number == "3" and benchmark not in set.union(*both))


def _table(
    number: str,
    place: tuple[str, str, int | None],
    measured: dict[tuple[str, str], list[Measurement]],
    metric: str | None,
    variant: str,
) -> Table:
    model, name, budget = place
    chosen = [m for cells in measured.values() for m in cells]
    benchmark = own = _benchmark(name, chosen)
    if metric not in (None, own.metric) and any(metric in m.metrics for m in chosen):
        benchmark = Benchmark(own.name, own.task, metric, metric.replace("_", " "), digits=own.digits)
    figures = printed(number, name, model, budget)
    columns = {column for row in figures.values() for column in row} | {column for _, column in measured}
    ordered = sorted(columns - {FULL}, key=float, reverse=number != "1")
    if number in ("3", "4"):
        ordered.insert(0, FULL)
    rows: dict[str, dict[str, Entry]] = {}
    for row in dict.fromkeys((*PARTS, *LABELS, *(row for row, _ in measured))):
        for column in ordered:
            # The paper's figures are of its own metric.
            paper = figures.get(row, {}).get(column) if benchmark is own else None
            entry = _entry(benchmark, measured.get((row, column), []), paper)
            if not entry.is_empty:
                rows.setdefault(row, {})[column] = entry
    title = {
        "1": f"Ratio of the uniform part, {name}, budget {budget}, {model}",
        "2": f"Parts of the cache, {name}, {model}",
    }.get(number, f"{name} ({benchmark.unit}), {model}")
    heading = f"{title}, {variant}" if variant else title
    return Table(number, heading, benchmark, model, tuple(ordered), rows, _notes(chosen), variant)


def _benchmark(name: str, chosen: Sequence[Measurement]) -> Benchmark:
    known = next((each for each in benchmarks().values() if each.name == name), None)
    return known or benchmark_of(name, next((m.metrics for m in chosen if m.metrics), None))


def _entry(benchmark: Benchmark, cells: Sequence[Measurement], paper: float | None) -> Entry:
    """Of several cells, which differ in their seed alone, the mean."""
    metric, scale = benchmark.metric, benchmark.scale
    finished = [m for m in cells if m.error is None and metric in m.metrics]
    if not finished:
        return Entry(paper=paper, failed=bool(cells))
    values = [scale * m.metrics[metric] for m in finished]
    errors = [scale * m.standard_errors[metric] for m in finished if metric in m.standard_errors]
    budgets = [m.effective_budget for m in finished if m.effective_budget is not None]
    # All seeds read the same documents, so that a mean over them does not lessen the documents' part.
    drawn = variance(values) / len(values) if len(values) > 1 else 0.0
    error = (fmean(each * each for each in errors) + drawn) ** 0.5 if errors else None
    return Entry(fmean(values), paper, fmean(budgets) if budgets else None, standard_error=error)


def _notes(cells: Sequence[Measurement]) -> tuple[str, ...]:
    """How they were measured, and which failed."""
    finished = [m for m in cells if m.error is None]
    roundings = sorted({m.rounding for m in finished if m.budget is not None})
    windows = sorted({m.window_size for m in finished if not m.of_any_window})
    documents = sorted({m.documents for m in finished if m.documents is not None})
    notes = [f"rounding {', '.join(roundings) or 'of no effect'}"] if finished else []
    notes += [f"window {', '.join(map(str, windows))}"] if windows else []
    notes += [f"{', '.join(map(str, documents))} documents a cell"] if documents else []
    seeds = sorted({m.seed for m in finished if get_method(m.method).seeded})
    notes += [f"random heads: mean of seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    return (*notes, *(f"failed: {m.method} {m.budget or ''}: {m.error}" for m in cells if m.error is not None))


def _by_window(cells: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    """The cells of one part, or of one part a window size, with what its title then says of it.

    Cells that keep every row, or none but the window's, belong to every part.
    """
    windows = sorted({m.window_size for m in cells if not m.of_any_window})
    if len(windows) < 2:
        return [("", list(cells))]
    return [(f"window {w}", [m for m in cells if m.of_any_window or m.window_size == w]) for w in windows]

"""From measurements to tables: each measured cell beside the paper's figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsemm.errors import ConfigError
from sparsemm.tables.measurements import Measurement
from sparsemm.tables.paper import Benchmark, benchmark_of, benchmarks, main_figure, paper, paper_model

METHOD_NAMES = {
    "sparsemm": "SparseMM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "random": "Random",
    "fullkv": "FullKV",
    "mask": "Visual heads masked",
    "mask_random": "Random heads masked",
}
PARTS = {
    "window": "Local window",
    "window+uniform": "Local window, uniform",
    "window+uniform+score": "Local window, uniform, score-preferred",
}
ALL_TABLES = ("1", "2", "3", "4")
FULL = "all rows"


@dataclass(frozen=True)
class Entry:
    """One cell: what was measured and what the paper printed, both in the benchmark's unit; None where absent."""

    measured: float | None = None
    paper: float | None = None
    effective_budget: float | None = None
    failed: bool = False

    @property
    def difference(self) -> float | None:
        """Measured - paper."""
        return None if self.measured is None or self.paper is None else self.measured - self.paper

    @property
    def is_empty(self) -> bool:
        return self.measured is None and self.paper is None and not self.failed


@dataclass(frozen=True)
class Table:
    """Entries by row label and column label.

    Attributes:
        number: "1" to "4" as in the paper; benchmarks it does not have stand with "3".
        title: Of this part: one benchmark and model.
        benchmark: What the entries measure.
        model: The model, as it was named.
        corner: What the rows are; the columns are budgets, or ratios in Table 1.
        notes: How the cells were measured.
        variant: What tells a part from others of its benchmark and model: the window, where there were several.
    """

    number: str
    title: str
    benchmark: Benchmark
    model: str
    corner: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Entry]]
    notes: tuple[str, ...] = ()
    variant: str = ""

    def entry(self, row: str, column: str) -> Entry:
        return self.rows[row].get(column, Entry())


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
        ConfigError: There is no such table.
    """
    numbers = list(numbers)
    if unknown := [number for number in numbers if number not in ALL_TABLES]:
        raise ConfigError(f"table {unknown[0]!r} is unknown; use {', '.join(ALL_TABLES)}")
    builder = _Builder(list(measurements), ratio, metric)
    tables = []
    for number, build in (("1", builder.ratios), ("2", builder.parts), ("3", builder.main), ("4", builder.main)):
        if number in numbers:
            tables += build(number)
    return [table for table in tables if whole or _was_measured(table)]


def _was_measured(table: Table) -> bool:
    return any(entry.measured is not None or entry.failed for row in table.rows.values() for entry in row.values())


class _Builder:
    def __init__(self, measurements: list[Measurement], ratio: float, metric: str | None) -> None:
        self.measurements, self.ratio, self.metric = measurements, ratio, metric

    # -- tables -------------------------------------------------------------------------------------------------------

    def ratios(self, number: str) -> list[Table]:
        """Table 1: one part a (model, task, budget), the paper's first."""
        data = paper()["table_1"]
        cells = [m for m in self.measurements if m.method == "sparsemm" and not _window_only(m)]
        known = next(each for each in benchmarks().values() if each.name == data["benchmark"])
        places = [(name, known.task, data["budget"]) for name in data["by_ratio"]]
        for place in sorted({(_shown(m.model), m.task, m.budget) for m in cells}):
            # Two ratios are no sweep where they are the two of Table 2.
            several = {m.ratio for m in cells if (_shown(m.model), m.task, m.budget) == place}
            if place not in places and several - {self.ratio, 1.0}:
                places.append(place)
        tables = []
        for model, task, budget in places:
            here = [m for m in cells if (_shown(m.model), m.task, m.budget) == (model, task, budget)]
            for window, chosen in _by_window(here):
                benchmark = self._benchmark(task, chosen)
                printed = data["by_ratio"].get(model, {}) if (benchmark.name, budget) == (known.name, 256) else {}
                measured = {f"{m.ratio:g}": m for m in chosen}
                columns = sorted({*printed, *measured}, key=float)
                rows = {"SparseMM": {c: self._entry(benchmark, measured.get(c), printed.get(c)) for c in columns}}
                title = f"Ratio of the uniform part, {benchmark.name}, budget {budget}, {model}"
                tables.append(self._table(number, title, benchmark, model, "ratio", columns, rows, chosen, window))
        return tables

    def parts(self, number: str) -> list[Table]:
        """Table 2: one part a (model, task)."""
        data = paper()["table_2"]
        known = next(each for each in benchmarks().values() if each.name == data["benchmark"])
        cells = [(part, m) for m in self.measurements if (part := self._part(m))]
        places = [(data["model"], known.task)]
        for place in sorted({(_shown(m.model), m.task) for part, m in cells if part == "window"}):
            if place not in places:
                places.append(place)
        tables = []
        for place in places:
            printed = data["by_parts"] if place == (data["model"], known.task) else {}
            for window, used in _by_window([m for _, m in cells if (_shown(m.model), m.task) == place]):
                chosen = {(self._part(m), str(m.budget)): m for m in used}
                if window and "window+uniform" not in {part for part, _ in chosen}:
                    continue
                benchmark = self._benchmark(place[1], used)
                budgets = {column for row in printed.values() for column in row} | {budget for _, budget in chosen}
                columns = sorted(budgets, key=int, reverse=True)
                rows = {
                    label: {
                        c: self._entry(benchmark, chosen.get((part, c)), printed.get(part, {}).get(c)) for c in columns
                    }
                    for part, label in PARTS.items()
                }
                title = f"Parts of the cache, {benchmark.name}, {place[0]}"
                tables.append(self._table(number, title, benchmark, place[0], "cache", columns, rows, used, window))
        return tables

    def main(self, number: str) -> list[Table]:
        """Tables 3 and 4: one part a (benchmark, model), methods against budgets."""
        data = paper()[f"table_{number}"]
        names = list(data["by_benchmark"])
        models = [data["model"]] if "model" in data else list(dict.fromkeys(paper()["models"].values()))
        tasks = {each.name: each.task for each in benchmarks().values()}
        places = [(model, tasks[name]) for name in names for model in models]
        in_paper = {tasks[name] for key in ("table_3", "table_4") for name in paper()[key]["by_benchmark"]}
        for place in sorted({(_shown(m.model), m.task) for m in self.measurements}):
            belongs = place[1] in {tasks[name] for name in names} or (number == "3" and place[1] not in in_paper)
            if place not in places and belongs:
                places.append(place)
        tables = []
        for model, task in places:
            here = [m for m in self.measurements if (_shown(m.model), m.task) == (model, task) and self._is_main(m)]
            for window, chosen in _by_window(here):
                if table := self._main_part(number, model, task, window, chosen):
                    tables.append(table)
        return tables

    def _main_part(
        self, number: str, model: str, task: str, window: str, chosen: Sequence[Measurement]
    ) -> Table | None:
        benchmark = self._benchmark(task, chosen)
        measured = {(m.method, FULL if m.budget is None else str(m.budget)): m for m in chosen}
        columns = {column for _, column in measured if column != FULL} | set(_printed_budgets(benchmark.name, model))
        ordered = sorted(columns, key=int, reverse=True)
        if not ordered and not measured:
            return None
        ordered.insert(0, FULL)
        rows = {}
        for method in dict.fromkeys((*METHOD_NAMES, *(method for method, _ in measured))):
            entries = {
                c: self._entry(
                    benchmark,
                    measured.get((method, c)),
                    None if c == FULL else main_figure(benchmark.name, model, method, int(c)),
                )
                for c in ordered
            }
            entries = {column: entry for column, entry in entries.items() if not entry.is_empty}
            if entries:
                rows[METHOD_NAMES.get(method, method)] = entries
        title = f"{benchmark.name} ({benchmark.unit}), {model}"
        return self._table(number, title, benchmark, model, "budget", ordered, rows, chosen, window)

    # -- cells --------------------------------------------------------------------------------------------------------

    def _part(self, m: Measurement) -> str | None:
        if m.method != "sparsemm" or m.budget is None:
            return None
        if _window_only(m):
            return "window"
        return {1.0: "window+uniform", self.ratio: "window+uniform+score"}.get(m.ratio)

    def _is_main(self, m: Measurement) -> bool:
        return m.method not in ("sparsemm", "random") or (m.ratio == self.ratio and not _window_only(m))

    def _benchmark(self, task: str, chosen: Sequence[Measurement]) -> Benchmark:
        metrics = next((m.metrics for m in chosen if m.metrics), None)
        found = benchmark_of(task, metrics)
        if self.metric is None or not metrics or self.metric not in metrics or self.metric == found.metric:
            return found
        return Benchmark(found.name, task, self.metric, self.metric.replace("_", " "), digits=found.digits)

    def _entry(self, benchmark: Benchmark, m: Measurement | None, printed: float | None) -> Entry:
        if benchmark.metric != benchmark_of(benchmark.task, {benchmark.metric: 0.0}).metric:
            printed = None  # the paper's figures are of its own metric
        if m is None:
            return Entry(paper=printed)
        value = m.metrics.get(benchmark.metric)
        measured = None if value is None else value * benchmark.scale
        return Entry(measured, printed, m.effective_budget, failed=m.error is not None or value is None)

    def _table(
        self,
        number: str,
        title: str,
        benchmark: Benchmark,
        model: str,
        corner: str,
        columns: Sequence[str],
        rows: dict[str, dict[str, Entry]],
        chosen: Sequence[Measurement],
        variant: str,
    ) -> Table:
        finished = [m for m in chosen if m.error is None]
        notes = []
        if finished:
            compressing = [m for m in finished if m.budget is not None]
            roundings = sorted({m.rounding for m in compressing})
            windows = sorted({m.window_size for m in finished if not _of_any_window(m)})
            documents = sorted({m.documents for m in finished if m.documents is not None})
            notes.append(f"rounding {', '.join(roundings) or 'of no effect'}")
            notes.append(f"window {', '.join(map(str, windows))}" if windows else "")
            notes.append(f"{', '.join(map(str, documents))} documents a cell" if documents else "")
        notes += [f"failed: {m.method} {m.budget or ''}: {m.error}" for m in chosen if m.error is not None]
        shown = tuple(note for note in notes if note)
        heading = f"{title}, {variant}" if variant else title
        return Table(number, heading, benchmark, model, corner, tuple(columns), rows, shown, variant)


def _shown(model: str) -> str:
    return paper_model(model) or model


def _window_only(m: Measurement) -> bool:
    """Table 2's first row: no row but the window's."""
    return m.budget is not None and m.budget == m.window_size


def _by_window(cells: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    """The cells of one part, or of one part a window size, with what its title then says of it.

    Cells that keep every row, or none but the window's, belong to every part.
    """
    windows = sorted({m.window_size for m in cells if not _of_any_window(m)})
    if len(windows) < 2:
        return [("", list(cells))]
    return [(f"window {w}", [m for m in cells if _of_any_window(m) or m.window_size == w]) for w in windows]


def _of_any_window(m: Measurement) -> bool:
    return m.budget is None or (m.method == "sparsemm" and _window_only(m))


def _printed_budgets(benchmark: str, model: str) -> list[str]:
    data = paper()
    found = data["table_3"]["by_benchmark"].get(benchmark, {}).get(model, {})
    if not found and model == data["table_4"]["model"]:
        found = data["table_4"]["by_benchmark"].get(benchmark, {})
    return [budget for row in found.values() for budget in row]

"""The table and the plot of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparsemm.errors import DataError
from sparsemm.experiments.evaluate import Cell, Results
from sparsemm.runs.lines import Panel, draw_panels
from sparsemm.runs.markdown import markdown_table, table_of, with_error
from sparsemm.runs.metrics import METRIC_LABELS
from sparsemm.runs.spread import show_spread


def format_table(cells: list[Cell], *, metric: str = "accuracy", task: str | None = None) -> str:
    """A Markdown table: one row per cell; where there are several tasks, one column of `metric` for each of them.

    `task` takes the documents of that task, or part of one ("read/3 words"), alone.

    Budgets are prompt rows per kv head. Bytes are those that one document's cache holds; "% of full" is the share of a
    full cache's rows, both for the same prompt and the same new tokens, and "slack %" what is held beyond those rows,
    in the same unit. ms/token is one decoding step of a batch: median and quartiles over the batches.

    Raises:
        DataError: There is no cell, or the group is unknown.
    """
    if not cells:
        raise DataError("there is no result to show; run the evaluation first")
    tasks = sorted({each for cell in cells for each in cell.tasks}, reverse=True)
    columns: dict[str, Callable[[Cell], str]] = {
        "method": lambda cell: cell.method,
        "budget": lambda cell: "-" if cell.nominal_budget is None else str(cell.nominal_budget),
        "effective": lambda cell: f"{cell.effective_budget:.2f}",
    }
    headings = {"accuracy": "accuracy", "exact_match": "exact match", "anls": "ANLS"}
    for name, heading in headings.items():
        title = f"{heading}: {task}" if task else heading
        columns[title] = lambda cell, name=name: f"{cell.mean(name, task):.3f}"
    for each in tasks if len(tasks) > 1 and task is None else []:
        columns[f"{headings[metric]}: {each}"] = lambda cell, each=each: f"{cell.mean(metric, each):.3f}"
    columns |= {
        "cache bytes": lambda cell: f"{cell.cache_bytes:,.0f}",
        "% of full": lambda cell: f"{100 * cell.cache_share:.1f}",
        "slack %": lambda cell: f"{100 * cell.slack_bytes / cell.full_cache_bytes:.1f}",
        "ms/token": lambda cell: show_spread(cell.ms_per_token),
    }
    return table_of(cells, columns)


def format_by_budget(cells: list[Cell], metric: str = "accuracy") -> str:
    """For every task a Markdown table of `metric` with its standard errors over the documents: a row for each method, a
    column for each budget. What keeps every row stands in the first column."""
    budgets = sorted({cell.nominal_budget for cell in cells if cell.nominal_budget is not None})
    found = {cell.key: cell for cell in cells}
    tables = []
    for task in sorted({each for cell in cells for each in cell.tasks}, reverse=True):
        rows = [
            [method, *(_mean_and_error(found.get((method, budget)), metric, task) for budget in (None, *budgets))]
            for method in dict.fromkeys(cell.method for cell in cells)
        ]
        tables.append(markdown_table([f"{metric}: {task}", "all rows", *map(str, budgets)], rows))
    return "\n\n".join(tables)


def _mean_and_error(cell: Cell | None, metric: str, task: str) -> str:
    return "" if cell is None else with_error(cell.mean(metric, task), cell.error(metric, task))


def describe(results: Results) -> str:
    """One paragraph on what the table was measured with."""
    settings, options = results.settings, results.settings.get("options", {})
    place = results.cells[-1].environment if results.cells else {}
    return (
        f"{settings['model']}, {settings['documents']} held-out documents, batches of {settings['batch_size']}, "
        f"{settings['dtype']} on {place.get('hardware', settings['device'])} ({place.get('threads', '?')} threads); "
        f"window {options.get('window_size')}, ratio {options.get('ratio')}, {options.get('rounding')} rounding, "
        f"seed {options.get('seed')}; caches with room for {settings['max_new_tokens']} new tokens; "
        f"torch {place.get('torch')}, transformers {place.get('transformers')}."
    )


def plot_accuracy(
    cells: list[Cell], path: str | Path, *, metric: str = "accuracy", task: str | None = None, title: str | None = None
) -> None:
    """Draw a metric against the budget: one line a method, methods that keep every row as horizontal lines.

    Bars and bands are standard errors over the documents.

    Args:
        cells: Cells of one evaluation.
        path: Image file; its ending chooses the format (png, svg, pdf).
        metric: `accuracy`, `exact_match` or `anls`.
        task: Only the documents of that group; by default all.
        title: Above the axes.

    Raises:
        DataError: No cell has a budget, or the metric, group or file ending is unknown.
    """
    if metric not in METRIC_LABELS:
        raise DataError(f"metric={metric!r} is unknown; use one of {', '.join(METRIC_LABELS)}")
    panel = Panel(METRIC_LABELS[metric] + (f" ({task})" if task else ""), title)
    for cell in cells:
        panel.add(cell.method, cell.nominal_budget, cell.mean(metric, task), cell.error(metric, task))
    draw_panels([[panel]], path, x_label="Budget (prompt rows kept per kv head)", size=(7.2, 4.6))

"""The table and the plot of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparsemm.errors import DataError
from sparsemm.experiments.evaluate import Cell, Results
from sparsemm.runs.lines import Panel, draw_panels
from sparsemm.runs.markdown import table_of
from sparsemm.runs.metrics import METRIC_LABELS


def format_table(cells: list[Cell]) -> str:
    """A Markdown table: one row per cell.

    Budgets are prompt rows per kv head; bytes are those of one document's cache at its end (prompt rows, generated rows
    and slack), beside the share of what all its tokens' keys and values take; ms/token is one decoding step of a batch.

    Raises:
        DataError: There is no cell.
    """
    if not cells:
        raise DataError("there is no result to show; run the evaluation first")
    tasks = sorted({task for cell in cells for task in cell.tasks}, reverse=True)
    columns: dict[str, Callable[[Cell], str]] = {
        "method": lambda cell: cell.method,
        "budget": lambda cell: "-" if cell.nominal_budget is None else str(cell.nominal_budget),
        "effective": lambda cell: f"{cell.effective_budget:.2f}",
        "accuracy": lambda cell: f"{cell.accuracy:.3f}",
        "exact match": lambda cell: f"{cell.exact_match:.3f}",
        "ANLS": lambda cell: f"{cell.anls:.3f}",
    }
    for task in tasks if len(tasks) > 1 else []:
        columns[f"accuracy: {task}"] = lambda cell, task=task: f"{cell.mean('accuracy', task):.3f}"
    columns |= {
        "cache bytes": lambda cell: f"{cell.cache_bytes:,.0f}",
        "% of full": lambda cell: f"{100 * cell.cache_share:.1f}",
        "ms/token": lambda cell: "" if cell.ms_per_token is None else f"{cell.ms_per_token:.2f}",
    }
    return table_of(cells, columns)


def describe(results: Results) -> str:
    """One paragraph on what the table was measured with."""
    settings, options = results.settings, results.settings.get("options", {})
    place = results.cells[-1].environment if results.cells else {}
    return (
        f"{settings['model']}, {settings['documents']} held-out documents, batches of {settings['batch_size']}, "
        f"{settings['dtype']} on {place.get('hardware', settings['device'])} ({place.get('threads', '?')} threads); "
        f"window {options.get('window_size')}, ratio {options.get('ratio')}, {options.get('rounding')} rounding, "
        f"seed {options.get('seed')}; cache bytes with room for {settings['max_new_tokens']} generated tokens; "
        f"torch {place.get('torch')}, transformers {place.get('transformers')}."
    )


def plot_accuracy(
    cells: list[Cell], path: str | Path, *, metric: str = "accuracy", task: str | None = None, title: str | None = None
) -> None:
    """Draw a metric against the budget: one line a method, methods that keep every row as horizontal lines.

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
        panel.add(cell.method, cell.nominal_budget, cell.mean(metric, task))
    draw_panels([[panel]], path, x_label="Budget (prompt rows kept per kv head)", size=(7.2, 4.6))

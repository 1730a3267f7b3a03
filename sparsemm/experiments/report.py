"""The table and the plot of an evaluation."""

from __future__ import annotations

from pathlib import Path

from sparsemm.errors import DataError
from sparsemm.runs.markdown import markdown_table
from sparsemm.runs.metrics import METRIC_LABELS
from sparsemm.runs.plots import log2_axis, method_lines, new_figure, plain_axes, save_figure
from sparsemm.runs.results import Cell, Results


def _tasks(cells: list[Cell]) -> list[str]:
    """Names of the whole tasks, without their parts by number of words."""
    return sorted({name for cell in cells for name in cell.groups if "/" not in name}, reverse=True)


def _rows(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    tasks = _tasks(cells)
    header = ["method", "budget", "effective", "accuracy", "exact match", "ANLS"]
    header += [f"accuracy: {task}" for task in tasks] if len(tasks) > 1 else []
    header += ["cache bytes", "% of full", "ms/token"]
    rows = []
    for cell in cells:
        row = [cell.method, "-" if cell.nominal_budget is None else str(cell.nominal_budget)]
        row += [f"{cell.effective_budget:.2f}", f"{cell.accuracy:.3f}", f"{cell.exact_match:.3f}", f"{cell.anls:.3f}"]
        if len(tasks) > 1:
            row += [f"{cell.groups[task]['accuracy']:.3f}" if task in cell.groups else "" for task in tasks]
        row += [f"{cell.cache_bytes:,.0f}", f"{100 * cell.cache_share:.1f}"]
        row += ["" if cell.ms_per_token is None else f"{cell.ms_per_token:.2f}"]
        rows.append(row)
    return header, rows


def format_table(cells: list[Cell]) -> str:
    """A Markdown table: one row per cell.

    Budgets are prompt rows per kv head; bytes are those of one document's cache at its end (prompt rows, generated rows
    and slack), beside the share of what all its tokens' keys and values take; ms/token is one decoding step of a batch.

    Raises:
        DataError: There is no cell.
    """
    if not cells:
        raise DataError("there is no result to show; run the evaluation first")
    header, rows = _rows(cells)
    return markdown_table(header, rows)


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
    lines: dict[str, list[tuple[int, float]]] = {}
    levels: dict[str, float] = {}
    for cell in cells:
        if task is not None and task not in cell.groups:
            raise DataError(f"task={task!r} is not in the results; use one of {', '.join(cell.groups)}")
        value = cell.groups[task][metric] if task else getattr(cell, metric)
        if cell.nominal_budget is None:
            levels[cell.method] = value
        else:
            lines.setdefault(cell.method, []).append((cell.nominal_budget, value))
    if not lines:
        raise DataError("no result has a budget, so there is nothing to draw a line through")

    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    method_lines(axes, lines, levels)
    budgets = [budget for points in lines.values() for budget, _ in points]
    log2_axis(axes, budgets, "Budget (prompt rows kept per kv head)")
    axes.set_ylabel(METRIC_LABELS[metric] + (f" ({task})" if task else ""))
    plain_axes(axes, title)
    # Beside the axes, so that it covers no line whatever the data.
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)

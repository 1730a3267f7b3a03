"""The paper's main figure: score against budget, one line a method, one panel a benchmark, one row a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemm.errors import DataError
from sparsemm.runs.plots import log2_axis, method_lines, new_figure, plain_axes, save_figure
from sparsemm.tables.build import FULL, METHOD_NAMES, Table

_BY_NAME = {name: method for method, name in METHOD_NAMES.items()}


def plot_budgets(tables: Sequence[Table], path: str | Path) -> None:
    """Draw every part of Tables 3 and 4 of which something was measured, full cache as a dashed line.

    Args:
        tables: From `build_tables`; others than Tables 3 and 4 are passed over.
        path: Image file; its ending chooses the format (png, svg, pdf).

    Raises:
        DataError: No method was measured at a budget, or the file ending is unknown.
    """
    panels = [table for table in tables if table.number in ("3", "4") and _budgets(table)]
    if not panels:
        raise DataError("no method was measured at a budget, so there is nothing to draw a line through")
    models = list(dict.fromkeys(table.model for table in panels))
    width = max(sum(table.model == model for table in panels) for model in models)
    figure = new_figure(3.4 * width + 1.8, 2.9 * len(models) + 0.3)
    axes = figure.subplots(len(models), width, squeeze=False)
    legend: dict[str, Any] = {}
    for row, model in enumerate(models):
        own = [table for table in panels if table.model == model]
        for column in range(width):
            if column < len(own):
                _panel(axes[row][column], own[column])
                handles, names = axes[row][column].get_legend_handles_labels()
                legend |= dict(zip(names, handles, strict=True))
            else:
                axes[row][column].set_axis_off()
    figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def _budgets(table: Table) -> list[int]:
    found = {c for row in table.rows.values() for c, e in row.items() if c != FULL and e.measured is not None}
    return sorted(map(int, found))


def _panel(axes: Any, table: Table) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    levels: dict[str, float] = {}
    for name, row in table.rows.items():
        method = _BY_NAME.get(name, name)
        for column, entry in row.items():
            if entry.measured is None:
                continue
            if column == FULL:
                levels[method] = entry.measured
            else:
                lines.setdefault(method, []).append((int(column), entry.measured))
    method_lines(axes, lines, levels)
    log2_axis(axes, _budgets(table), "Budget (prompt rows a kv head)")
    plain_axes(axes)
    axes.set_title(f"{table.benchmark.name}\n{', '.join(filter(None, (table.model, table.variant)))}", fontsize=9)
    axes.set_ylabel(table.benchmark.unit, fontsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.tick_params(labelsize=8)

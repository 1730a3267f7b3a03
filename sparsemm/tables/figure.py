"""The paper's main figure: score against budget, one line a method, one panel a benchmark, one row a model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemm.errors import DataError
from sparsemm.experiments.report import LABELS, STYLES
from sparsemm.io import write_bytes_atomic
from sparsemm.tables.build import FULL, METHOD_NAMES, Table

_BY_NAME = {name: method for method, name in METHOD_NAMES.items()}
_LEVELS = {"fullkv": ("black", "--"), "mask": ("#56B4E9", "-."), "mask_random": ("#56B4E9", ":")}
_OTHER = ("#E69F00", "P")


def plot_budgets(tables: Sequence[Table], path: str | Path) -> None:
    """Draw every part of Tables 3 and 4 of which something was measured, full cache as a dashed line.

    Args:
        tables: From `build_tables`; others than Tables 3 and 4 are passed over.
        path: Image file; its ending chooses the format (png, svg, pdf).

    Raises:
        DataError: No method was measured at a budget, or the file ending is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [table for table in tables if table.number in ("3", "4") and _budgets(table)]
    if not panels:
        raise DataError("no method was measured at a budget, so there is nothing to draw a line through")
    models = list(dict.fromkeys(table.model for table in panels))
    width = max(sum(table.model == model for table in panels) for model in models)
    figure = Figure(figsize=(3.4 * width + 1.8, 2.9 * len(models) + 0.3), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if Path(path).suffix.lstrip(".").lower() not in canvas.get_supported_filetypes():
        raise DataError(f"{path} does not end in an image format; use .png, .svg or .pdf")
    axes = figure.subplots(len(models), width, squeeze=False)
    legend: dict[str, Any] = {}
    for row, model in enumerate(models):
        own = [table for table in panels if table.model == model]
        for column in range(width):
            if column < len(own):
                _panel(axes[row][column], own[column], legend)
            else:
                axes[row][column].set_axis_off()
    figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower())
    write_bytes_atomic(path, buffer.getvalue())


def _budgets(table: Table) -> list[int]:
    found = {c for row in table.rows.values() for c, e in row.items() if c != FULL and e.measured is not None}
    return sorted(map(int, found))


def _panel(axes: Any, table: Table, legend: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for name, row in table.rows.items():
        method = _BY_NAME.get(name, name)
        if FULL in row and row[FULL].measured is not None:
            colour, dashes = _LEVELS.get(method, ("black", "--"))
            line = axes.axhline(row[FULL].measured, color=colour, linestyle=dashes, linewidth=1.4)
            legend.setdefault(LABELS.get(method, method), line)
        points = sorted((int(c), e.measured) for c, e in row.items() if c != FULL and e.measured is not None)
        if points:
            colour, marker = STYLES.get(method, _OTHER)
            bold = method == "sparsemm"
            (line,) = axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=5 if bold else 4,
                linewidth=2.2 if bold else 1.3,
                zorder=3 if bold else 2,
            )
            legend.setdefault(LABELS.get(method, method), line)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_budgets(table)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{table.benchmark.name}\n{', '.join(filter(None, (table.model, table.variant)))}", fontsize=9)
    axes.set_xlabel("Budget (prompt rows a kv head)", fontsize=8)
    axes.set_ylabel(table.benchmark.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)

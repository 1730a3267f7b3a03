"""The paper's main figure: score against budget, one line a method, one panel a benchmark, one row a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsemm.errors import DataError
from sparsemm.runs.lines import Panel, draw_panels
from sparsemm.tables.build import FULL, Table


def plot_budgets(tables: Sequence[Table], path: str | Path) -> None:
    """Draw every part of Tables 3 and 4 of which something was measured, full cache as a dashed line.

    Error bars are standard errors over the documents, where they are known. Budgets at which one method alone was
    measured, as by an ablation, are left out.

    Args:
        tables: From `build_tables`; others than Tables 3 and 4 are passed over.
        path: Image file; its ending chooses the format (png, svg, pdf).

    Raises:
        DataError: No method was measured at a budget, or the file ending is unknown.
    """
    rows: dict[str, list[Panel]] = {}
    for table in tables:
        panel = _panel(table)
        if table.number in ("3", "4") and panel.lines:
            rows.setdefault(table.model, []).append(panel)
    if not rows:
        raise DataError("no method was measured at a budget, so there is nothing to draw a line through")
    draw_panels(list(rows.values()), path, x_label="Budget (prompt rows a kv head)")


def _panel(table: Table) -> Panel:
    title = f"{table.benchmark.name}: {', '.join(filter(None, (table.model, table.variant)))}"
    panel = Panel(table.benchmark.unit, title, group=table.benchmark.name)
    measured = [
        (method, column, entry)
        for method, row in table.rows.items()
        for column, entry in row.items()
        if entry.measured is not None
    ]
    several = len({method for method, column, _ in measured if column != FULL}) > 1
    for method, column, entry in measured:
        if column == FULL:
            panel.add(method, None, entry.measured, entry.standard_error)
        elif not several or sum(other == column for _, other, _ in measured) > 1:
            panel.add(method, float(column), entry.measured, entry.standard_error)
    return panel

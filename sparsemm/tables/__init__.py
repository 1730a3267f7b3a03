"""The paper's Tables 1 to 4 and its main figure, from what lmms-eval wrote, beside the paper's own figures."""

from __future__ import annotations

from sparsemm.tables.build import Entry, Table, build_tables
from sparsemm.tables.figure import plot_budgets
from sparsemm.tables.measurements import Measurement, read_measurements
from sparsemm.tables.render import render_tables

__all__ = [
    "Entry",
    "Measurement",
    "Table",
    "build_tables",
    "plot_budgets",
    "read_measurements",
    "render_tables",
]

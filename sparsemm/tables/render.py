"""Tables as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from sparsemm.errors import ConfigError
from sparsemm.runs.markdown import markdown_table
from sparsemm.tables.build import Entry, Table, row_label

MINUS = "\N{MINUS SIGN}"
LEGEND = "A cell reads: measured [effective budget] / paper / difference; a part that is not there is left empty."
LEGEND_ALONE = "A cell reads: measured [effective budget]."


def render_tables(tables: Sequence[Table], form: str = "markdown") -> str:
    """The tables in one text, ending with a line break.

    Raises:
        ConfigError: `form` is none of markdown, latex, csv, json.
    """
    if form not in FORMS:
        raise ConfigError(f"format {form!r} is unknown; use one of {', '.join(FORMS)}")
    return FORMS[form](tables)


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    text = "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS)


def _measured(entry: Entry, digits: int) -> str:
    if entry.failed:
        return "failed"
    budget = "" if None in (entry.measured, entry.effective_budget) else f" [{entry.effective_budget:.4g}]"
    return _number(entry.measured, digits) + budget


def _paper(entry: Entry, digits: int) -> list[str]:
    """The paper's figure and the difference."""
    return [_number(entry.paper, digits), _number(entry.difference, digits, sign=True)]


def _has_paper(table: Table) -> bool:
    return any(entry.paper is not None for row in table.rows.values() for entry in row.values())


def _heading(table: Table) -> str:
    # A part without a figure of the paper has the form of its table, but is not that table.
    return f"Table {table.number}: {table.title}" if _has_paper(table) else f"As Table {table.number}: {table.title}"


def _lines(table: Table, show: Callable[[Entry], str]) -> list[list[str]]:
    """A row of strings a row, its label first."""
    return [[row_label(row), *(show(table.entry(row, column)) for column in table.columns)] for row in table.rows]


def _markdown(tables: Sequence[Table]) -> str:
    blocks = []
    for table in tables:
        beside, digits = _has_paper(table), table.benchmark.digits

        def show(entry: Entry, beside: bool = beside, digits: int = digits) -> str:
            if entry.is_empty:
                return ""
            parts = [_measured(entry, digits), *(_paper(entry, digits) if beside else [])]
            return " / ".join(parts).strip()

        notes = LEGEND if beside else LEGEND_ALONE
        if table.notes:
            notes += f" {'; '.join(table.notes)}."
        grid = markdown_table([table.corner, *table.columns], _lines(table, show))
        blocks.append("\n".join([f"**{_heading(table)}**", "", grid, "", notes]))
    return "\n\n".join(blocks) + "\n"


_LATEX_SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", MINUS: "$-$"}


def _escape(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)


def _latex(tables: Sequence[Table]) -> str:
    blocks = []
    for table in tables:
        digits = table.benchmark.digits

        def show(entry: Entry, digits: int = digits) -> str:
            text = _escape(_measured(entry, digits))
            inner = _escape(", ".join(filter(None, _paper(entry, digits))))
            return f"{text} {{\\scriptsize({inner})}}".strip() if inner else text

        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(_heading(table))}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [" & ".join(map(_escape, (table.corner, *table.columns))) + r" \\", r"\midrule"]
        lines += [" & ".join([_escape(label), *cells]) + r" \\" for label, *cells in _lines(table, show)]
        blocks.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def _records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    return [
        {
            "table": table.number,
            "benchmark": table.benchmark.name,
            "task": table.benchmark.task,
            "metric": table.benchmark.metric,
            "unit": table.benchmark.unit,
            "model": table.model,
            "row": row_label(row),
            "budget": None if table.corner == "ratio" else column,
            "ratio": column if table.corner == "ratio" else None,
            **dataclasses.asdict(entry),
            "difference": entry.difference,
            "title": table.title,
        }
        for table in tables
        for row, entries in table.rows.items()
        for column, entry in entries.items()
    ]


def _csv(tables: Sequence[Table]) -> str:
    records = _records(tables)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _json(tables: Sequence[Table]) -> str:
    return json.dumps(_records(tables), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
}
ENDINGS = {"markdown": "md", "csv": "csv", "latex": "tex", "json": "json"}

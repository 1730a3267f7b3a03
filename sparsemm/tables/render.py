"""Tables as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from sparsemm.errors import ConfigError
from sparsemm.runs.markdown import markdown_table
from sparsemm.tables.build import Entry, Table

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
    if value is None:
        return ""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def _measured(entry: Entry, digits: int) -> str:
    if entry.failed:
        return "failed"
    if entry.measured is None or entry.effective_budget is None:
        return _number(entry.measured, digits)
    return f"{_number(entry.measured, digits)} [{entry.effective_budget:.4g}]"


def _has_paper(table: Table) -> bool:
    return any(entry.paper is not None for row in table.rows.values() for entry in row.values())


def _text(entry: Entry, digits: int, beside: bool) -> str:
    if entry.is_empty:
        return ""
    parts = [_measured(entry, digits)]
    if beside:
        parts += [_number(entry.paper, digits), _number(entry.difference, digits, sign=True)]
    return " / ".join(parts).strip()


def _markdown(tables: Sequence[Table]) -> str:
    blocks = []
    for table in tables:
        beside = _has_paper(table)
        digits = table.benchmark.digits
        rows = [[label, *(_text(table.entry(label, c), digits, beside) for c in table.columns)] for label in table.rows]
        heading = f"**{_heading(table)}**"
        notes = LEGEND if beside else LEGEND_ALONE
        if table.notes:
            notes += f" {'; '.join(table.notes)}."
        blocks.append("\n".join([heading, "", markdown_table([table.corner, *table.columns], rows), "", notes]))
    return "\n\n".join(blocks) + "\n"


def _heading(table: Table) -> str:
    # A part without a figure of the paper has the form of its table, but is not that table.
    return f"Table {table.number}: {table.title}" if _has_paper(table) else f"As Table {table.number}: {table.title}"


_LATEX_SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", MINUS: "$-$"}


def _escape(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)


def _latex(tables: Sequence[Table]) -> str:
    blocks = []
    for table in tables:
        beside, digits = _has_paper(table), table.benchmark.digits
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(_heading(table))}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [" & ".join(map(_escape, (table.corner, *table.columns))) + r" \\", r"\midrule"]
        for label in table.rows:
            cells = [_latex_cell(table.entry(label, column), digits, beside) for column in table.columns]
            lines.append(" & ".join([_escape(label), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _latex_cell(entry: Entry, digits: int, beside: bool) -> str:
    text = _escape(_measured(entry, digits))
    if beside and entry.paper is not None:
        inner = [_number(entry.paper, digits), _number(entry.difference, digits, sign=True)]
        text += rf" {{\scriptsize({_escape(', '.join(part for part in inner if part))})}}"
    return text.strip()


def _records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    records = []
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                entry = table.entry(row, column)
                if entry.is_empty:
                    continue
                records.append(
                    {
                        "table": table.number,
                        "benchmark": table.benchmark.name,
                        "task": table.benchmark.task,
                        "metric": table.benchmark.metric,
                        "unit": table.benchmark.unit,
                        "model": table.model,
                        "row": row,
                        table.corner if table.corner == "ratio" else "budget": column,
                        "measured": entry.measured,
                        "paper": entry.paper,
                        "difference": entry.difference,
                        "effective_budget": entry.effective_budget,
                        "failed": entry.failed,
                        "title": table.title,
                    }
                )
    return records


def _csv(tables: Sequence[Table]) -> str:
    names = "table benchmark task metric unit model row budget ratio measured paper difference".split()
    names += ["effective_budget", "failed", "title"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(tables))
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

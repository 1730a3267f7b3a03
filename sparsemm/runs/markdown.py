"""Tables in Markdown that also read well as plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lines of a Markdown table with its columns aligned: the first `left` to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]

    def shown(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([shown(lines[0]), shown(rule), *map(shown, lines[1:])])


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    """`0.512 ± 0.021`; without the error where there is none."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")


def table_of(items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]], *, left: int = 1) -> str:
    """`markdown_table` of one row an item; `columns` are the headings and what stands below them."""
    return markdown_table(list(columns), [[show(item) for show in columns.values()] for item in items], left=left)

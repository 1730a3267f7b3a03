"""Panels of lines: ranges that start at zero and agree within a group, one legend that names every method once."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sparsemm.errors import DataError
from sparsemm.runs import lines
from sparsemm.runs.lines import Panel, draw_panels


def panel(group: str, top: float, error: float | None = None) -> Panel:
    made = Panel("accuracy", group, group=group)
    for x in (8, 16):
        made.add("sparsemm", x, top * x / 16, error)
        made.add("snapkv", x, top * x / 32)
    made.add("mask", None, 0.1)
    made.add("mask_random", None, 0.2)
    return made


def test_one_range_a_group_from_zero_and_one_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(lines, "save_figure", lambda figure, path: figures.append(figure))
    rows = [
        [panel("read", 0.9), panel("field", 0.4)],
        [panel("read", 0.5, 0.3), panel("field", 0.6, 0.1)],
        [panel("x", 1)],
    ]
    draw_panels(rows, tmp_path / "a.png", x_label="Budget")
    (figure,) = figures
    ranges = [tuple(round(each, 3) for each in axes.get_ylim()) for axes in figure.axes]
    assert ranges[:5] == [(0, 0.945), (0, 0.735), (0, 0.945), (0, 0.735), (0, 1.05)]
    assert not figure.axes[5].axison
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["SparseMM", "SnapKV", "Visual heads masked", "Random heads masked"]
    levels = [line for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert len({(line.get_color(), line.get_linestyle()) for line in levels}) == 2
    assert len({line.get_color() for line in levels}) == 2, "told apart without the dashes, too"
    figure.canvas.draw()
    assert legend.get_window_extent().width < figure.bbox.width
    assert legend.get_window_extent().height < 0.2 * figure.bbox.height


def test_panels_without_a_line_are_refused(tmp_path: Path) -> None:
    flat = Panel("accuracy", levels={"fullkv": (0.9, None)})
    with pytest.raises(DataError, match="no result has a budget"):
        draw_panels([[flat]], tmp_path / "a.png", x_label="Budget")

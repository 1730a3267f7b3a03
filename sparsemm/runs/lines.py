"""Pictures of methods as lines, over budgets or prompt lengths: one panel or many, one legend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemm.errors import DataError
from sparsemm.runs.plots import LABELS, new_figure, plain_axes, save_figure

# A colour of the palette and a marker each, for print without colour.
_STYLES = {
    "sparsemm": ("#D55E00", "o"),
    "snapkv": ("#0072B2", "s"),
    "pyramidkv": ("#009E73", "^"),
    "adakv": ("#CC79A7", "D"),
    "random": ("#7A7A7A", "v"),
    "rate_distortion": ("#000000", "*"),
    "rate_distortion_mixkv": ("#8B0000", "*"),
    "head_kv": ("#E69F00", "P"),
    "vl_cache": ("#56B4E9", "X"),
    "mixkv": ("#F0A58A", "p"),
    "expected_attention": ("#8C6BB1", "h"),
    "keydiff": ("#B8860B", "<"),
    "knorm": ("#7FBF7B", ">"),
    "streaming_llm": ("#BDBDBD", "d"),
}
_OTHER_STYLES = (("#1B4F72", "1"), ("#7B241C", "2"), ("#145A32", "3"), ("#4A235A", "4"))
_LEVELS = {"fullkv": ("black", "--"), "mask": ("#56B4E9", "-."), "mask_random": ("#B8860B", ":")}


Value = tuple[float, float | None]
"""What was measured, and its standard error where it is known."""


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        y_label: What is drawn.
        title: Above it.
        group: Panels of one group have one range of y.
        lines: By method, by x.
        levels: Of methods that have one value only: a horizontal line.
    """

    y_label: str
    title: str | None = None
    group: str = ""
    lines: dict[str, dict[float, Value]] = field(default_factory=dict)
    levels: dict[str, Value] = field(default_factory=dict)

    def add(self, method: str, x: float | None, y: float, error: float | None = None) -> None:
        """One value; without an `x` that of a level."""
        if x is None:
            self.levels[method] = (y, error)
        else:
            self.lines.setdefault(method, {})[x] = (y, error)

    @property
    def places(self) -> list[float]:
        """All x."""
        return sorted({x for line in self.lines.values() for x in line})

    @property
    def top(self) -> float:
        """The highest y, error bar included."""
        values = [*self.levels.values(), *(value for line in self.lines.values() for value in line.values())]
        return max(y + (error or 0.0) for y, error in values)


def draw_panels(
    rows: Sequence[Sequence[Panel]],
    path: str | Path,
    *,
    x_label: str,
    x_form: Callable[[float], str] = "{:g}".format,
    labels: Mapping[str, str] = LABELS,
    title: str | None = None,
    size: tuple[float, float] = (4.6, 3.4),
) -> None:
    """Draw the panels, row by row, with one legend below them; y from 0, the same range for all panels of a group.

    Args:
        rows: Panels; rows may differ in number.
        path: Image file; its ending chooses the format (png, svg, pdf).
        x_label, x_form: Of the logarithmic x axes: what, and how ticks are written.
        labels: Names of methods.
        title: Above all.
        size: Inches of one panel.

    Raises:
        DataError: No panel holds a line, or the file ending is unknown.
    """
    drawn = [panel for row in rows for panel in row]
    if not any(panel.lines for panel in drawn):
        raise DataError("no result has a budget, so there is nothing to draw a line through")
    width = max(map(len, rows))
    figure = new_figure(size[0] * width, size[1] * len(rows) + 0.5)
    legend: dict[str, Any] = {}
    for row, all_axes in zip(rows, figure.subplots(len(rows), width, squeeze=False), strict=True):
        for axes in all_axes[len(row) :]:
            axes.set_axis_off()
        for panel, axes in zip(row, all_axes, strict=False):
            _draw(axes, panel, labels)
            _log2_axis(axes, panel.places, x_label, x_form)
            plain_axes(axes, panel.title)
            axes.set_ylim(0, 1.05 * max(each.top for each in drawn if each.group == panel.group) or 1)
            axes.set_ylabel(panel.y_label)
            handles, names = axes.get_legend_handles_labels()
            legend |= dict(zip(names, handles, strict=True))
    if title:
        figure.suptitle(title, fontsize=11)
    flat = {labels[method] for method in _LEVELS}
    names = sorted(legend, key=lambda name: name in flat)  # methods, then what they are measured against
    columns = max(2, int(size[0] * width / 1.9))
    figure.legend(
        [legend[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    save_figure(figure, path)


def _draw(axes: Any, panel: Panel, labels: Mapping[str, str]) -> None:
    for method in sorted(panel.levels, key=list(_LEVELS).index):
        colour, dashes = _LEVELS[method]
        level, error = panel.levels[method]
        axes.axhline(level, color=colour, linestyle=dashes, linewidth=1.4, label=labels[method])
        if error:
            axes.axhspan(level - error, level + error, color=colour, alpha=0.12, linewidth=0)
    others = iter(_OTHER_STYLES * len(panel.lines))
    for method in sorted(panel.lines, key=lambda name: list(_STYLES).index(name) if name in _STYLES else len(_STYLES)):
        colour, marker = _STYLES[method] if method in _STYLES else next(others)
        own = method == "sparsemm"
        places = sorted(panel.lines[method])
        values, errors = zip(*(panel.lines[method][x] for x in places), strict=True)
        axes.errorbar(
            places,
            values,
            yerr=None if None in errors else errors,
            capsize=2.5,
            elinewidth=1.0,
            color=colour,
            marker=marker,
            markersize=6 if own else 5,
            linewidth=2.4 if own else 1.5,
            zorder=3 if own else 2,
            label=labels.get(method, method),
        )


def _log2_axis(axes: Any, values: Sequence[float], label: str, form: Callable[[float], str]) -> None:
    """A logarithmic x axis with a tick at each value, left out where labels would run into one another."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks: list[float] = []
    for value in values:
        if not ticks or value >= 1.25 * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)

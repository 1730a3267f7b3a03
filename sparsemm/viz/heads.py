"""Maps and curves: head scores, budgets, the masking and the head-rows experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparsemm.errors import DataError, HeadScoreError
from sparsemm.head_scores import heads_of_share
from sparsemm.runs.plots import COLOURS, LINES, SIGNED_COLOURS, contrast, new_figure, plain_axes, spaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsemm.head_scores import HeadScores

_MOST_NUMBERED = 160
"""Tables of up to so many cells carry their numbers."""

_MARKED_SHARE = 0.05
"""The paper's figure of how few heads are visual: the sparsity curves say what so many hold."""


def draw_score_map(scores: HeadScores, *, num_kv_heads: int | None = None, title: str | None = None) -> Figure:
    """Layers by query heads, coloured by each head's share of the score (the paper's Figure 2).

    Args:
        scores: Table `[num_layers, num_query_heads]`.
        num_kv_heads: Also mark the groups of query heads that share a kv head.
        title: Above the map.

    Raises:
        HeadScoreError: The query heads cannot be grouped so.
    """
    group = 1
    if num_kv_heads is not None:
        scores.to_kv_heads(num_kv_heads)  # raises where they cannot be grouped
        group = scores.num_query_heads // num_kv_heads
    figure = new_figure(max(4.8, 1.6 + 0.27 * scores.num_query_heads), max(3.0, 1.5 + 0.22 * scores.num_layers))
    axes = figure.add_subplot()
    draw_table(figure, [axes], [100 * scores.normalised().numpy()], "Share of the visual score (%)", "{:.1f}")
    axes.set_xlabel("Query head")
    if group > 1:
        for edge in range(group, scores.num_query_heads, group):
            axes.axvline(edge - 0.5, color="white", linewidth=1.6)
        upper = axes.secondary_xaxis("top")
        middles = [(number + 0.5) * group - 0.5 for number in range(num_kv_heads)]
        upper.set_xticks(middles, [str(number) for number in range(num_kv_heads)])
        upper.tick_params(length=0)
        upper.set_xlabel(f"kv head (shared by {group} query heads)")
    figure.suptitle(title or "", fontsize=11)
    return figure


def draw_sparsity(named_scores: Mapping[str, HeadScores], *, title: str | None = None) -> Figure:
    """How much of the score the top heads hold, against their share of all heads: one line per table.

    A share of heads is rounded down to whole heads, here as in `HeadScores.top_share`: the lines are steps.

    Raises:
        DataError: There is no table.
    """
    if not named_scores:
        raise DataError("there is no score table to draw")
    figure = new_figure(6.6, 4.4)
    axes = figure.add_subplot()
    for number, (name, scores) in enumerate(named_scores.items()):
        held, total = 100 * scores.held_by_top().numpy(), scores.values.numel()
        few, share = heads_of_share(_MARKED_SHARE, total), 100 * scores.top_share(_MARKED_SHARE)
        colour, dashes = LINES[number % len(LINES)], ("-", "--", ":")[number // len(LINES) % 3]
        label = f"{name}: top {100 * _MARKED_SHARE:g} % = {few} of {total} heads, {share:.0f} % of the score"
        axes.plot(
            np.linspace(0, 100, total + 1), held, color=colour, linestyle=dashes, linewidth=1.8, label=label,
            drawstyle="steps-post",
        )  # fmt: skip
        axes.plot(100 * _MARKED_SHARE, share, color=colour, marker="o", markersize=5, zorder=3)
    axes.plot([0, 100], [0, 100], color="#999999", linestyle=":", linewidth=1.2, label="all heads alike")
    axes.axvline(100 * _MARKED_SHARE, color="#BBBBBB", linewidth=0.9, zorder=0)
    axes.set(xlim=(0, 100), ylim=(0, 103), ylabel="Share of the visual score (%)")
    axes.set_xlabel("Share of heads, highest scores first, rounded down to whole heads (%)")
    plain_axes(axes, title, grid="y")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    return figure


def draw_budgets(rows: Tensor, *, title: str | None = None, prompt_length: int | None = None) -> Figure:
    """Rows kept per kv head, as a map and as bars.

    Args:
        rows: `[num_layers, num_kv_heads]`, from `sparsemm.head_budgets` or `handle.stats.kept_rows[row]`.
        title: Above both.
        prompt_length: Also draw where a head keeps the whole prompt.

    Raises:
        DataError: The table has another form.
    """
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"budgets have shape {list(rows.shape)}; give [num_layers, num_kv_heads]")
    num_layers, num_heads = rows.shape
    if rows.numel() <= _MOST_NUMBERED:
        figure = new_figure(max(8.0, 3.2 + 0.3 * num_heads + 0.03 * rows.numel()), max(3.2, 1.5 + 0.22 * num_layers))
        left, right = figure.subplots(1, 2, width_ratios=[max(1.0, 0.06 * num_heads), 2.0])
    else:  # a thousand bars take the whole width
        figure = new_figure(14.0, 5.0 + 0.18 * num_layers)
        left, right = figure.subplots(2, 1, height_ratios=[0.18 * num_layers + 1, 3.6])
    values = rows.detach().cpu().numpy().astype(float)
    draw_table(figure, [left], [values], "Rows kept", "{:.0f}")
    left.set_xlabel("kv head")
    right.bar(np.arange(values.size), values.flatten(), width=1.0, color=LINES[0])
    right.axhline(values.mean(), color=LINES[1], linewidth=1.4, label=f"mean {values.mean():.2f}")
    if prompt_length is not None:
        right.axhline(prompt_length, color="black", linestyle="--", linewidth=1.2, label=f"prompt {prompt_length}")
    for edge in range(num_heads, values.size, num_heads):
        right.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.8)
    ticks = spaced(num_layers)
    right.set_xticks([(layer + 0.5) * num_heads - 0.5 for layer in ticks], [str(layer) for layer in ticks])
    right.tick_params(axis="x", length=0)
    right.set(xlim=(-0.5, values.size - 0.5), xlabel="Layer (its kv heads side by side)", ylabel="Rows kept")
    plain_axes(right, grid="y")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title or "", fontsize=11)
    return figure


def draw_masking(
    rows: Sequence[Mapping[str, Any]], *, label: str = "Character accuracy", title: str | None = None
) -> Figure:
    """Reading against the number of masked heads: the visual ones, and the mean and range of random others.

    Args:
        rows: One per number of heads: `num_heads`, `share`, `visual` and its `visual_error` (standard error over the
            documents, None where unknown), `mean`, `low`, `high`, `seeds`.
        label: What was measured.
        title: Above the axes.

    Raises:
        DataError: There is no run.
    """
    if not rows:
        raise DataError("there is no run to draw")
    figure = new_figure(6.6, 4.2)
    axes = figure.add_subplot()
    drawn = [row for row in rows if row["mean"] is not None]
    heads = [row["num_heads"] for row in drawn]
    low, high, mean = ([row[name] for row in drawn] for name in ("low", "high", "mean"))
    others = f"random other heads (mean of {max(row['seeds'] for row in rows)})"
    axes.fill_between(heads, low, high, color=LINES[0], alpha=0.2, linewidth=0, label="range of the seeds")
    axes.plot(heads, mean, color=LINES[0], marker="s", linewidth=1.8, label=others)
    seen = [row for row in rows if row["visual"] is not None]
    places, visual, errors = ([row[name] for row in seen] for name in ("num_heads", "visual", "visual_error"))
    axes.errorbar(
        places, visual, yerr=None if None in errors else errors, capsize=2.5, elinewidth=1.0, color=LINES[1],
        marker="o", linewidth=2.2, label="highest visual scores",
    )  # fmt: skip
    counts = [row["num_heads"] for row in rows]
    axes.set_xticks(counts, [f"{row['num_heads']}\n{round(100 * row['share'], 1):g} %" for row in rows], fontsize=8)
    axes.set(xlabel="Masked query heads, and their share", ylabel=label)
    axes.set_ylim(bottom=0)
    plain_axes(axes, title, grid="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def draw_head_rows(changes: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """What each kv head's changed rows did to the accuracy: a map of layers by kv heads for each task, in points.

    Args:
        changes: Change of accuracy by the name of the task, `[num_layers, num_kv_heads]`, NaN where not changed.
        title: Above the maps.
    """
    num_layers, num_heads = next(iter(changes.values())).shape
    figure = new_figure(max(4.8, 1.0 + 0.45 * num_heads) * len(changes) + 0.9, max(3.0, 1.5 + 0.22 * num_layers))
    panels = figure.subplots(1, len(changes), squeeze=False)[0]
    tables = [100 * table.numpy() for table in changes.values()]
    draw_table(figure, panels, tables, "Change of accuracy (points)", "{:+.0f}", signed=True)
    for axes, name in zip(panels, changes, strict=True):
        axes.set_xlabel("kv head")
        axes.set_title(name, fontsize=10)
    figure.suptitle(title or "", fontsize=11)
    return figure


def kv_heads_of(scores: HeadScores, given: int | None) -> int | None:
    """The number of kv heads to mark: given, else what the score file says it was chased on, if it does.

    Raises `HeadScoreError` for what is no number of heads.
    """
    number = scores.provenance.get("num_kv_heads") if given is None else given
    if number is not None and (not isinstance(number, int) or number < 1):
        raise HeadScoreError(f"num_kv_heads={number!r} is not a number of heads")
    return number


def draw_table(
    figure: Figure,
    panels: Sequence[Any],
    tables: Sequence[np.ndarray],
    label: str,
    form: str,
    *,
    signed: bool = False,
    fontsize: float = 6.5,
) -> None:
    """Coloured tables of one scale and one colour bar, layer 0 above, empty where NaN; small ones carry their numbers.

    Colours run from 0 to the largest value, those of `signed` tables from the largest loss to the same gain.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    largest = max(*(float(np.nanmax(np.abs(values), initial=0)) for values in tables), 1e-12)
    scale, colours = Normalize(-largest if signed else 0, largest), SIGNED_COLOURS if signed else COLOURS
    for axes, values in zip(panels, tables, strict=True):
        image = axes.imshow(values, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        axes.set_ylabel("Layer")
        axes.set_xticks(spaced(values.shape[1]))
        axes.set_yticks(spaced(values.shape[0]))
        for (row, column), value in np.ndenumerate(values) if values.size <= _MOST_NUMBERED else ():
            if not np.isnan(value):
                number = form.format(value).replace("-", "−")
                number = "0" if signed and float(form.format(value)) == 0 else number
                colour = contrast(*colormaps[colours](scale(value))[:3])
                axes.text(column, row, number, ha="center", va="center", fontsize=fontsize, color=colour)
    figure.colorbar(image, ax=list(panels), label=label, pad=0.02)

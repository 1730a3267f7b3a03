"""Pictures of head scores, of budgets, and of the masking experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparsemm.errors import DataError, HeadScoreError
from sparsemm.runs.plots import COLOURS, LINES, SIGNED_COLOURS, contrast, new_figure, plain_axes, save_figure, spaced

if TYPE_CHECKING:
    from sparsemm.head_scores import HeadScores

_MOST_NUMBERED = 160
"""Tables of up to so many cells carry their numbers."""


def draw_score_map(
    scores: HeadScores, path: str | Path, *, num_kv_heads: int | None = None, title: str | None = None
) -> None:
    """Layers by query heads, coloured by each head's share of the score (the paper's Figure 2).

    Args:
        scores: Table `[num_layers, num_query_heads]`.
        path: Image file.
        num_kv_heads: Also mark the groups of query heads that share a kv head.
        title: Above the map.

    Raises:
        HeadScoreError: The query heads cannot be grouped so.
        DataError: The file's ending is no image format.
    """
    if num_kv_heads is not None:
        scores.to_kv_heads(num_kv_heads)  # raises where they cannot be grouped
    groups = None if num_kv_heads is None else scores.num_query_heads // num_kv_heads
    figure = new_figure(max(4.8, 1.6 + 0.27 * scores.num_query_heads), max(3.0, 1.5 + 0.22 * scores.num_layers))
    axes = figure.add_subplot()
    _table(
        figure, axes, 100 * scores.normalised().numpy(), "Share of the visual score (%)", numbers="{:.1f}",
        columns="Query head",
    )  # fmt: skip
    if groups is not None and groups > 1:
        for edge in range(groups, scores.num_query_heads, groups):
            axes.axvline(edge - 0.5, color="white", linewidth=1.6)
        upper = axes.secondary_xaxis("top")
        upper.set_xticks([(number + 0.5) * groups - 0.5 for number in range(num_kv_heads)])
        upper.set_xticklabels([str(number) for number in range(num_kv_heads)])
        upper.tick_params(length=0)
        upper.set_xlabel(f"kv head (shared by {groups} query heads)")
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_sparsity(named_scores: Mapping[str, HeadScores], path: str | Path, *, title: str | None = None) -> None:
    """How much of the score the top heads hold, against their share of all heads: one line per table.

    Raises:
        DataError: There is no table, or the file's ending is no image format.
    """
    if not named_scores:
        raise DataError("there is no score table to draw")
    figure = new_figure(6.6, 4.2)
    axes = figure.add_subplot()
    for number, (name, scores) in enumerate(named_scores.items()):
        held = np.append(0.0, np.sort(scores.normalised().flatten().numpy())[::-1].cumsum())
        share = np.arange(len(held)) / (len(held) - 1)
        few = len(held) <= 80
        axes.plot(
            100 * share, 100 * held, color=LINES[number % len(LINES)], marker="o" if few else None, markersize=3.5,
            linestyle=("-", "--", ":")[number // len(LINES) % 3], linewidth=1.8, label=name,
        )  # fmt: skip
    axes.plot([0, 100], [0, 100], color="#999999", linestyle=":", linewidth=1.2, label="all heads alike")
    axes.axvline(5, color="#BBBBBB", linewidth=0.9, zorder=0)
    axes.annotate(
        "5 % of heads", (5, 3), xytext=(4, 0), textcoords="offset points", fontsize=8, color="#666666", va="center"
    )
    axes.set(xlim=(0, 100), ylim=(0, 103), xlabel="Share of heads, highest scores first (%)")
    axes.set_ylabel("Share of the visual score (%)")
    plain_axes(axes, title, grid="y")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_budgets(rows: Tensor, path: str | Path, *, title: str | None = None, prompt_length: int | None = None) -> None:
    """Rows kept per kv head, as a map and as bars.

    Args:
        rows: `[num_layers, num_kv_heads]`, from `sparsemm.head_budgets` or `handle.stats.kept_rows[row]`.
        path: Image file.
        title: Above both.
        prompt_length: Also draw where a head keeps the whole prompt.

    Raises:
        DataError: The table has another form, or the file's ending is no image format.
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
    _table(figure, left, values, "Rows kept", numbers="{:.0f}", columns="kv head")
    right.bar(np.arange(values.size), values.flatten(), width=1.0, color=LINES[0])
    mean = values.mean()
    right.axhline(mean, color=LINES[1], linewidth=1.4, label=f"mean {mean:.2f}")
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
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_masking(
    rows: Sequence[Mapping[str, Any]], path: str | Path, *, label: str = "Character accuracy", title: str | None = None
) -> None:
    """Reading against the number of masked heads: the visual ones, and the mean and range of random others.

    Args:
        rows: One per number of heads: `num_heads`, `share`, `visual`, `mean`, `low`, `high`, `seeds`, as
            `sparsemm.experiments.masking.summarise` makes them.
        path: Image file.
        label: What was measured.
        title: Above the axes.

    Raises:
        DataError: There is no run, or the file's ending is no image format.
    """
    if not rows:
        raise DataError("there is no run to draw")
    figure = new_figure(6.6, 4.2)
    axes = figure.add_subplot()
    drawn = [row for row in rows if row["mean"] is not None]
    heads = [row["num_heads"] for row in drawn]
    seeds = max((row["seeds"] for row in rows), default=0)
    axes.fill_between(
        heads, [row["low"] for row in drawn], [row["high"] for row in drawn], color=LINES[0], alpha=0.2, linewidth=0,
        label="range of the seeds",
    )  # fmt: skip
    axes.plot(
        heads, [row["mean"] for row in drawn], color=LINES[0], marker="s", linewidth=1.8,
        label=f"random other heads (mean of {seeds})",
    )  # fmt: skip
    seen = [row for row in rows if row["visual"] is not None]
    axes.plot(
        [row["num_heads"] for row in seen], [row["visual"] for row in seen], color=LINES[1], marker="o", linewidth=2.2,
        label="highest visual scores",
    )  # fmt: skip
    counts = [row["num_heads"] for row in rows]
    axes.set_xticks(counts, [f"{row['num_heads']}\n{100 * row['share']:.1f} %" for row in rows], fontsize=8)
    axes.set(xlabel="Masked query heads, and their share", ylabel=label)
    axes.set_ylim(bottom=0)
    plain_axes(axes, title, grid="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_head_rows(changes: Mapping[str, Tensor], path: str | Path, *, title: str | None = None) -> None:
    """What each kv head's changed rows did to the accuracy: a map of layers by kv heads for each task, in points.

    Args:
        changes: Change of accuracy by task, `[num_layers, num_kv_heads]`, NaN where a head was not changed.
        path: Image file.
        title: Above the maps.

    Raises:
        DataError: The file's ending is no image format.
    """
    num_layers, num_heads = next(iter(changes.values())).shape
    width = max(4.8, 1.6 + 0.45 * num_heads)
    figure = new_figure(width * len(changes), max(3.0, 1.5 + 0.22 * num_layers))
    for axes, (task, table) in zip(np.atleast_1d(figure.subplots(1, len(changes))), changes.items(), strict=True):
        values = 100 * table.numpy()
        label = "Change of accuracy (points)"
        _table(figure, axes, values, label, numbers="{:+.0f}", columns="kv head", signed=True)
        axes.set_title(task, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def kv_heads_of(scores: HeadScores, given: int | None) -> int | None:
    """The number of kv heads to mark: given, else what the score file says it was chased on, if it does."""
    number = scores.provenance.get("num_kv_heads") if given is None else given
    if number is not None and (not isinstance(number, int) or number < 1):
        raise HeadScoreError(f"num_kv_heads={number!r} is not a number of heads")
    return number


def _table(
    figure: Any, axes: Any, values: np.ndarray, label: str, *, numbers: str, columns: str, signed: bool = False
) -> None:
    """A coloured table, layers from the bottom up, empty where NaN; small ones carry their numbers.

    Colours run from 0 to the largest value, those of a `signed` table from the largest loss to the same gain.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    largest = max(float(np.nanmax(np.abs(values), initial=0)), 1e-12)
    scale, colours = Normalize(-largest if signed else 0, largest), SIGNED_COLOURS if signed else COLOURS
    image = axes.imshow(values, cmap=colours, norm=scale, origin="lower", aspect="auto", interpolation="nearest")
    axes.set(xlabel=columns, ylabel="Layer")
    axes.set_xticks(spaced(values.shape[1]))
    axes.set_yticks(spaced(values.shape[0]))
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if values.size <= _MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            colour = contrast(*colormaps[colours](scale(value))[:3])
            axes.text(column, row, numbers.format(value), ha="center", va="center", fontsize=6.5, color=colour)

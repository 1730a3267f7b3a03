"""What a calibration measured: sensitivities as a map, distortion curves, and the budgets that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sparsemm.errors import DataError
from sparsemm.head_scores import rank_correlation
from sparsemm.runs.plots import LINES, new_figure, plain_axes
from sparsemm.viz.heads import draw_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsemm.head_scores import HeadScores

_CURVES = 8
"""Curves that are drawn where no heads are named: of the most sensitive heads."""


def draw_calibration(
    scores: HeadScores,
    budgets: Mapping[str, Tensor],
    *,
    heads: Sequence[tuple[int, int]] = (),
    title: str | None = None,
) -> Figure:
    """Sensitivities, distortion curves of chosen heads, and maps of rows beside one another, in one scale.

    Args:
        scores: A calibration.
        budgets: Rows of every kv head by what is said above the map, each `[num_layers, num_kv_heads]`.
        heads: (layer, query head) of the curves; the most sensitive ones by default.
        title: Above all.

    Raises:
        DataError: The scores are no calibration, or a head is not one of the model's.
    """
    curves = scores.curves
    if curves is None:
        raise DataError("these are head scores only; `sparsemm calibrate` measures sensitivities and curves")
    num_layers, num_heads = curves.sensitivities.shape
    ranking = curves.sensitivities.flatten().argsort(descending=True, stable=True)[:_CURVES].tolist()
    heads = list(heads) or [divmod(index, num_heads) for index in ranking]
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise DataError(f"head {layer}-{head} is not one of {num_layers} layers x {num_heads} query heads")
    height = max(2.6, 1.2 + 0.22 * num_layers)
    figure = new_figure(max(10.0, 4.0 + 0.27 * num_heads), 2 * height + 1.2)
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2, width_ratios=[1.0, 1.1])
    share = 100 * curves.sensitivities / curves.sensitivities.sum().clamp(min=1e-300)
    draw_table(above, [left], [share.numpy()], "Share of all sensitivity (%)", "{:.1f}")
    left.set_xlabel("Query head")
    plain = rank_correlation(scores.values, curves.sensitivities)
    left.set_title(f"How much answers depend on a head\n(rank correlation with plain scores {plain:.2f})", fontsize=9)
    for number, (layer, head) in enumerate(heads):
        right.plot(
            curves.rows, curves.distortions[layer, head].tolist(), color=LINES[number % len(LINES)],
            linestyle=("-", "--", ":")[number // len(LINES) % 3], linewidth=1.6, label=f"{layer}-{head}",
        )  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_xticks(curves.rows[::4], [str(row) for row in curves.rows[::4]])
    right.set(xlabel="Rows", ylabel="Distortion (window alone: 1)", ylim=(0, None))
    plain_axes(right, grid="y")
    right.set_title("What a head loses with fewer rows", fontsize=9)
    right.legend(title="layer-head", fontsize=7, title_fontsize=8, ncols=2, frameon=False)
    panels = below.subplots(1, len(budgets), squeeze=False)[0]
    draw_table(below, panels, [rows.double().numpy() for rows in budgets.values()], "Rows kept", "{:.0f}")
    for axes, name in zip(panels, budgets, strict=True):
        axes.set_xlabel("kv head")
        axes.set_title(name, fontsize=9)
    figure.suptitle(title or "", fontsize=11)
    return figure

"""Rate-distortion budgets: rows go where, as measured, they save the answer most (spec section 10).

e_h(r) = c_h * s_h(r), how much the answer depends on a head times what the head loses with r rows, summed over the
query heads of a kv head. Budgets minimise the sum of all e_h(b_h) on the lower convex hulls: every next row goes to
the head whose hull falls fastest (Shoham and Gersho 1988, bit allocation among quantisers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import BoolTensor, LongTensor, Tensor

from sparsemm.errors import ConfigError
from sparsemm.head_scores import Curves, HeadScores
from sparsemm.methods.method import BudgetRequest, Method, PromptStates, Settings
from sparsemm.methods.mixkv import MIXKV, with_diversity
from sparsemm.methods.snapkv import pooled_window_scores


@dataclass(frozen=True)
class Piece:
    """A straight piece of a kv head's hull: from `begin` to `end` rows, every row saves `saving`."""

    saving: float
    head: int
    begin: int
    end: int


def rate_distortion_budgets(request: BudgetRequest) -> LongTensor:
    """`hand_out` by the curves of SnapKV's ranking."""
    return hand_out(request, snapkv_errors)


def budgets_of_two_rankings(request: BudgetRequest) -> LongTensor:
    """`hand_out` by the curves of that ranking which serves a head better."""
    return hand_out(request, smaller_errors)


def served_by_mixkv(head_scores: HeadScores, num_kv_heads: int) -> BoolTensor:
    """The kv heads that lose less with MixKV's ranking than with SnapKV's: bool `[num_layers, num_kv_heads]`.

    In the mean over the calibration's numbers of rows, which grow by equal factors.
    """
    curves = head_scores.curves
    snapkv, mixkv = (errors_of(curves, num_kv_heads, each) for each in (curves.distortions, curves.distortions_mixkv))
    return mixkv.mean(-1) < snapkv.mean(-1)


def scores_of_two_rankings(settings: Settings, states: PromptStates) -> Tensor:
    """SnapKV's scores, of the heads that it serves better MixKV's."""
    scores = pooled_window_scores(settings, states)
    return torch.where(states.ranking[:, None], with_diversity(scores, states), scores)


def errors_of(curves: Curves, num_kv_heads: int, distortions: Tensor) -> Tensor:
    """c_h s_h(r), summed over the query heads of a kv head: float64 `[num_layers, num_kv_heads, len(rows)]`."""
    num_layers, _, points = distortions.shape
    return (curves.sensitivities[..., None] * distortions).view(num_layers, num_kv_heads, -1, points).sum(2)


def snapkv_errors(head_scores: HeadScores, num_kv_heads: int) -> Tensor:
    """`errors_of` SnapKV's ranking."""
    return errors_of(head_scores.curves, num_kv_heads, head_scores.curves.distortions)


def smaller_errors(head_scores: HeadScores, num_kv_heads: int) -> Tensor:
    """`errors_of` the ranking that `served_by_mixkv` tells."""
    mixkv = errors_of(head_scores.curves, num_kv_heads, head_scores.curves.distortions_mixkv)
    chosen = served_by_mixkv(head_scores, num_kv_heads)
    return torch.where(chosen[..., None], mixkv, snapkv_errors(head_scores, num_kv_heads))


def hand_out(request: BudgetRequest, errors: Callable[[HeadScores, int], Tensor]) -> LongTensor:
    """Rows of every kv head, window included: int64 `[num_layers, num_kv_heads]`.

    The sum is exact and every head's rows grow with the budget. Equal savings go to the lower layer, then head. Where
    no head gains any more, the rest is split equally among those with room.

    Raises:
        ConfigError: The calibration was made with a larger window.
        HeadScoreError: It does not fit the model.
    """
    settings, length = request.settings, request.prompt_length
    shape = (request.num_layers, request.num_kv_heads)
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    window, curves = settings.window_size, request.head_scores.curves
    if window < curves.rows[0]:
        raise ConfigError(
            f"window_size={window} is smaller than the {curves.rows[0]} of the calibration, which measured nothing "
            f"below it; use window_size={curves.rows[0]}, or calibrate again"
        )
    if settings.budget >= length:
        return torch.full(shape, length, dtype=torch.long)
    count = shape[0] * shape[1]
    rows, left = [window] * count, (settings.budget - window) * count
    for piece in hull_pieces(request.head_scores, request.num_kv_heads, errors):
        taken = min(left, min(piece.end, length) - rows[piece.head])
        if taken > 0:
            rows[piece.head] += taken
            left -= taken
    for head, more in enumerate(split_equally(left, [length - each for each in rows])):
        rows[head] += more
    return torch.tensor(rows).view(shape)


@functools.lru_cache(maxsize=8)
def hull_pieces(head_scores: HeadScores, num_kv_heads: int, errors: Callable[[HeadScores, int], Tensor]) -> list[Piece]:
    """The pieces of all hulls, largest saving first; of a head, those of fewer rows come first."""
    every, rows = errors(head_scores, num_kv_heads).flatten(0, 1).tolist(), head_scores.curves.rows
    pieces = [piece for head, values in enumerate(every) for piece in lower_hull(head, rows, values)]
    return sorted(pieces, key=lambda piece: (-piece.saving, piece.head))


def lower_hull(head: int, rows: list[int], errors: list[float]) -> list[Piece]:
    """The falling part of the lower convex hull of the points (rows, errors); savings fall strictly along it."""
    hull: list[Piece] = []
    corners = [0]
    for point in range(1, len(rows)):
        while True:
            start = corners[-1]
            saving = (errors[start] - errors[point]) / (rows[point] - rows[start])
            if not hull or saving < hull[-1].saving:
                break
            hull.pop()
            corners.pop()
        hull.append(Piece(saving, head, rows[start], rows[point]))
        corners.append(point)
    return [piece for piece in hull if piece.saving > 0]


def split_equally(total: int, rooms: list[int]) -> list[int]:
    """Split `total` rows equally, nobody above its room; what does not divide goes to the first with room left."""
    shares = [0] * len(rooms)
    waiting = sorted(range(len(rooms)), key=lambda index: rooms[index])
    for place, index in enumerate(waiting):
        if rooms[index] * (len(rooms) - place) > total:
            level, over = divmod(total, len(rooms) - place)
            for rank, each in enumerate(sorted(waiting[place:])):
                shares[each] = level + (rank < over)
            break
        shares[index] = rooms[index]
        total -= rooms[index]
    return shares


RATE_DISTORTION = Method(
    name="rate_distortion", model_budgets=rate_distortion_budgets, head_scores="calibrated", paper_rounding=False
)

RATE_DISTORTION_MIXKV = Method(
    name="rate_distortion_mixkv",
    model_budgets=budgets_of_two_rankings,
    head_scores="calibrated_mixkv",
    score_positions=scores_of_two_rankings,
    rankings=served_by_mixkv,
    sees=MIXKV.sees,
    paper_rounding=False,
)
"""How many rows a head needs depends on which it gets: ranked as MixKV ranks them, they serve many heads sooner. Where
they do not, as in a first layer whose heads average over the whole page, SnapKV's ranking stays."""

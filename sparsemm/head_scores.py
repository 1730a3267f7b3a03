"""Visual-head scores (spec section 4): one non-negative number per query head, and where they come from."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.models.identity import Identity
from sparsemm.runs.score_files import ScoreFile, read_scores, write_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Curves:
    """What a calibration measured of every query head (spec section 10), all float64 on the CPU.

    Args:
        rows: Numbers of rows, ascending; the first is the window's size.
        sensitivities: `[num_layers, num_query_heads]`, how much the answer depends on what the head sees outside the
            window.
        distortions: `[num_layers, num_query_heads, len(rows)]`, what of it is lost with so many rows; 1 with the window
            alone, 0 from the longest prompt on.
        retrieval: `[num_layers, num_query_heads]`, how much each head looks at the place of the answer that it
            predicts; None where no page said where that is.
        distortions_mixkv: As `distortions`, which are those of SnapKV's ranking of rows, for that of MixKV; None where
            it was not measured.

    Raises:
        HeadScoreError: The tables do not fit together, or hold values that are not finite or negative.
    """

    rows: list[int]
    sensitivities: Tensor
    distortions: Tensor
    retrieval: Tensor | None = None
    distortions_mixkv: Tensor | None = None

    def __post_init__(self) -> None:
        for name, table in self.tables.items():
            object.__setattr__(self, name, _table(table, name))
        if len(self.rows) < 1 or any(
            isinstance(row, bool) or not isinstance(row, int) or row <= before
            for before, row in zip([0, *self.rows], self.rows, strict=False)
        ):
            raise HeadScoreError(f"rows={self.rows} of the curves are not ascending whole numbers")
        shape = (*self.sensitivities.shape, len(self.rows))
        for name in ("distortions", "distortions_mixkv"):
            table = self.tables.get(name)
            if table is not None and (len(shape) != 3 or table.shape != shape):
                raise HeadScoreError(
                    f"{name} {list(table.shape)} do not fit sensitivities {list(self.sensitivities.shape)} and "
                    f"{len(self.rows)} numbers of rows"
                )
        if self.retrieval is not None and self.retrieval.shape != self.sensitivities.shape:
            raise HeadScoreError(
                f"retrieval scores {list(self.retrieval.shape)} do not fit sensitivities "
                f"{list(self.sensitivities.shape)}"
            )

    @property
    def tables(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        names = ("sensitivities", "distortions", "retrieval", "distortions_mixkv")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, by the names of the fields; what was not measured is left out."""
        return {"rows": self.rows, **{name: table.tolist() for name, table in self.tables.items()}}


class HeadScores:
    """Scores of the query heads of one language model.

    Args:
        values: Table `[num_layers, num_query_heads]`: finite, non-negative, not all zero. Kept as float64 on the CPU.
        curves: What a calibration measured beside them, for `method="rate_distortion"`.
        **provenance: What the scores come from, as JSON values: model, dataset, num_images, num_hits, match_rule, seed,
            library versions. Saved beside the values.

    Raises:
        HeadScoreError: The table has no such form; the message names the head, or what is wrong.
    """

    def __init__(self, values: Any, *, curves: Curves | None = None, **provenance: Any) -> None:
        table = _table(values, "head scores")
        if table.ndim != 2 or 0 in table.shape:
            raise HeadScoreError(
                f"head scores have shape {list(table.shape)}; give a table [num_layers, num_query_heads]"
            )
        if curves is not None and curves.sensitivities.shape != table.shape:
            raise HeadScoreError(
                f"curves are of {list(curves.sensitivities.shape)} heads, scores of {list(table.shape)}"
            )
        if not (table > 0).any():
            raise HeadScoreError("head scores are all zero, so they rank no head; chase again with more images")
        self.values: Tensor = table
        self.curves = curves
        self.provenance: dict[str, Any] = dict(provenance)
        self.any_model = False
        """Whether scores that were chased on another model are taken all the same."""

    @property
    def num_layers(self) -> int:
        return self.values.shape[0]

    @property
    def num_query_heads(self) -> int:
        return self.values.shape[1]

    def __repr__(self) -> str:
        model = self.provenance.get("model") or "unknown model"
        return f"HeadScores({self.num_layers} layers x {self.num_query_heads} query heads, {model})"

    def describe(self) -> dict[str, Any]:
        """Shape, digest of the values and provenance: what a result file needs to say which table it used."""
        digest = hashlib.sha256(self.values.contiguous().numpy().tobytes())
        if self.curves is not None:
            digest.update(repr(self.curves.rows).encode())
            for table in self.curves.tables.values():
                digest.update(table.contiguous().numpy().tobytes())
        return {"shape": list(self.values.shape), "sha256": digest.hexdigest(), "provenance": self.provenance}

    def check_shape(self, num_layers: int, num_query_heads: int) -> None:
        """Raise `HeadScoreError` unless the table is `[num_layers, num_query_heads]`."""
        if tuple(self.values.shape) != (num_layers, num_query_heads):
            raise HeadScoreError(
                f"head scores are for {self.num_layers} layers x {self.num_query_heads} query heads, the model has "
                f"{num_layers} x {num_query_heads}; use the file chased for this model"
            )

    @property
    def identity(self) -> Identity:
        """The checkpoint that the scores were chased on, as far as the file says."""
        return Identity(*(self.provenance.get(name) for name in ("model", "weights")))

    def check_model(self, model: Identity) -> str | None:
        """Whether the scores belong to `model`: equal weights, or else the last part of the name.

        Returns:
            None if they do; else what cannot be told, or what differs though it is accepted. Other weights under the
            same name are also logged, as a warning.

        Raises:
            HeadScoreError: They were chased on another model, and `any_model` is off.
        """
        mine, same_weights = self.identity, self.identity.has_weights_of(model)
        if same_weights:
            return None
        if mine.name is None:
            return "the file does not say which model the scores were chased on"
        if model.name is None:
            return f"the scores were chased on {mine.name}, the model in memory has no name to compare"
        if mine.short_name != model.short_name:
            if self.any_model:
                return f"the scores were chased on {mine.name}, another model"
            raise HeadScoreError(
                f"the head scores were chased on {mine.name}, the model is {model.name}; use those of this model, or "
                "take these all the same (--any-head-scores, in Python HeadScores.load(path, any_model=True))"
            )
        if same_weights is None:
            return None
        notice = f"{model.name} has other weights than the model of that name the scores were chased on; chase again"
        _warn(notice)
        return notice

    def normalised(self) -> Tensor:
        """The table divided by its sum: float64 `[num_layers, num_query_heads]`."""
        # Division by the largest first keeps the sum finite for very large scores.
        scaled = self.values / self.values.max()
        return scaled / scaled.sum()

    def to_kv_heads(self, num_kv_heads: int) -> Tensor:
        """Scores summed over each kv head's query heads: float64 `[num_layers, num_kv_heads]`.

        Raises:
            HeadScoreError: The number of query heads is not a multiple of `num_kv_heads`.
        """
        if num_kv_heads < 1 or self.num_query_heads % num_kv_heads:
            raise HeadScoreError(
                f"{self.num_query_heads} query heads cannot be grouped under num_kv_heads={num_kv_heads}"
            )
        return self.values.view(self.num_layers, num_kv_heads, -1).sum(-1)

    def held_by_top(self) -> Tensor:
        """Share of the whole score that the k highest scores hold, for k = 0 to all: float64 `[heads + 1]`."""
        ranked = self.normalised().flatten().sort(descending=True).values
        return torch.cat([ranked.new_zeros(1), ranked.cumsum(0)])

    def top_share(self, fraction: float) -> float:
        """Share of the whole score held by the top `fraction` of the heads (`heads_of_share` of them).

        Raises `ConfigError` for a fraction outside of 0 to 1.
        """
        return float(self.held_by_top()[heads_of_share(fraction, self.values.numel())])

    def num_heads_holding(self, share: float) -> int:
        """The smallest number of heads that together hold `share` of the whole score, above 0 and at most 1.

        Raises `HeadScoreError` for any other share.
        """
        if not 0.0 < share <= 1.0:
            raise HeadScoreError(f"share={share} must lie above 0 and at most 1")
        return min(int((self.held_by_top() < share - 1e-12).sum()), self.values.numel())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write values and provenance as JSON, atomically; `load` returns the same float64 values."""
        curves = None if self.curves is None else self.curves.to_dict()
        write_scores(path, ScoreFile(self.values.tolist(), self.provenance, curves))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, any_model: bool = False) -> HeadScores:
        """Read a file of ours, chased or calibrated, or one of the original release (`{"layer-head": [score, ...]}`).

        The release's scores are averaged over samples and normalised to sum 1; keys are read by name. A file of another
        model than the one it is used with is an error at its use, unless `any_model` is set.

        Raises:
            HeadScoreError: The file is missing, not JSON, in neither format, or its table is not one of scores.
        """
        file = read_scores(path)
        try:
            scores = cls(file.values, curves=None if file.curves is None else Curves(**file.curves))
        except HeadScoreError as error:
            raise HeadScoreError(f"{os.fspath(path)}: {error}") from error
        if file.release:
            scores = cls(scores.normalised())
        scores.provenance, scores.any_model = file.provenance, any_model
        return scores


def heads_of_share(share: float, num_heads: int) -> int:
    """How many heads a share of them is, everywhere shares are counted: rounded down to whole heads (5 % of 32: one).

    Raises:
        ConfigError: The share does not lie between 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"share={share} of heads must lie between 0 and 1")
    return math.floor(share * num_heads + 1e-9)  # 0.29 of 100 heads is 28.999… in binary arithmetic


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two tables of one shape; NaN where one of them holds a single value."""
    values = torch.stack([first.flatten(), second.flatten()])
    # Ties share their mean rank.
    ranks = [(row < row[:, None]).sum(1) + ((row == row[:, None]).sum(1) - 1) / 2 for row in values]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@functools.lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Once a process: every patch of an evaluation asks anew."""
    logger.warning(message)


def _first_head(bad: Tensor) -> str:
    layer, head, *_ = [*bad.nonzero()[0].tolist(), 0, 0]
    return f"layer {layer}, head {head}"


def _table(values: Any, what: str) -> Tensor:
    """A float64 table of `values` on the CPU. Raises `HeadScoreError` unless they are numbers, finite and >= 0."""
    try:
        given = values.detach().cpu() if isinstance(values, Tensor) else values
        table = torch.as_tensor(given, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise HeadScoreError(f"{what} are not a rectangular table of numbers ({error})") from error
    if not torch.isfinite(table).all():
        raise HeadScoreError(f"{what} hold NaN or infinity at {_first_head(~torch.isfinite(table))}")
    if (table < 0).any():
        raise HeadScoreError(f"{what} are negative at {_first_head(table < 0)}; they must be >= 0")
    return table

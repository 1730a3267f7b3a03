"""The masking experiment: how much a model still reads without its visual heads, and without random others (spec 6)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.experiments.session import PageReader, PageScores, page_scores
from sparsemm.head_scores import heads_of_share
from sparsemm.models import family_of
from sparsemm.models.layers import ragged_layers
from sparsemm.plan import Plan
from sparsemm.runs.markdown import table_of
from sparsemm.runs.metrics import METRICS
from sparsemm.runs.results import RunFile

if TYPE_CHECKING:
    from sparsemm.head_scores import HeadScores


@dataclass(frozen=True)
class MaskedRun(PageScores):
    """What a model read with some heads masked.

    Attributes:
        kind: "none", "visual" (the highest scores) or "random" (seeded, outside of the visual ones).
        num_heads: How many query heads were masked.
        share: `num_heads` / all query heads.
        seed: Of a random choice, else None.
    """

    kind: str
    num_heads: int
    share: float
    seed: int | None

    @property
    def key(self) -> tuple[str, int, int | None]:
        return self.kind, self.num_heads, self.seed


class MaskingResults(RunFile[MaskedRun]):
    """A masking experiment: its runs, one per choice of heads."""

    FORMAT = "sparsemm-masking"
    VERSION = 2
    SUBJECT = "a masking experiment"
    RUN = MaskedRun


def heads_of_shares(shares: Sequence[float], num_heads: int) -> list[int]:
    """Whole numbers of heads for shares between 0 and 1, rounded down as `mask_ratio` is; doubles once."""
    return list(dict.fromkeys(heads_of_share(share, num_heads) for share in shares))


def masking_experiment(
    reader: PageReader,
    head_scores: HeadScores,
    *,
    num_heads: Sequence[int] = (0, 1, 2, 3, 4, 6, 8),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    mask_mode: str = "zero_query",
) -> list[MaskedRun]:
    """Read the pages with the highest-scoring heads masked, and with as many random other ones for each seed.

    Args:
        reader: With other pages than those that the scores were chased on.
        head_scores: Of its model.
        num_heads: How many heads to mask, in turn.
        seeds: Of the random choices.
        mask_mode: "zero_query" or "zero_output".

    Raises:
        ConfigError: A number of heads cannot be masked, or at random outside of the visual ones.
        DataError: The reader's output holds another experiment.
    """
    text_config = family_of(reader.model).text_model(reader.model).config
    head_scores.check_shape(len(ragged_layers(text_config)), text_config.num_attention_heads)
    configs = _configs(head_scores, num_heads, seeds, mask_mode)
    total = head_scores.values.numel()
    results = reader.run(
        MaskingResults,
        {"head_scores": head_scores.describe(), "mask_mode": mask_mode},
        configs,
        lambda key: nullcontext(configs[key]),
        lambda key, readings: MaskedRun(*key[:2], key[1] / total, key[2], **page_scores(readings)),
    )
    return [results.find(*key) for key in configs]


def _configs(
    head_scores: HeadScores, num_heads: Sequence[int], seeds: Sequence[int], mask_mode: str
) -> dict[tuple[str, int, int | None], CompressionConfig]:
    """The configuration of every run; impossible ones are errors before anything is read."""
    total = head_scores.values.numel()
    configs: dict[tuple[str, int, int | None], CompressionConfig] = {}
    if not num_heads:
        raise ConfigError("num_heads is empty; say how many heads to mask")
    for count in dict.fromkeys(num_heads):
        if not 0 <= count <= total:
            raise ConfigError(f"{count} heads cannot be masked, the model has {total}")
        common: dict[str, Any] = dict(
            budget=None, head_scores=head_scores, mask_ratio=count / total, mask_mode=mask_mode
        )
        if count == 0:
            configs["none", 0, None] = CompressionConfig(method="mask", **common)
            continue
        configs["visual", count, None] = CompressionConfig(method="mask", **common)
        for seed in seeds:
            configs["random", count, seed] = CompressionConfig(method="mask_random", seed=seed, **common)
    for (_, count, _), config in configs.items():
        masked = Plan(config, *head_scores.values.shape, num_kv_heads=1).masked_heads
        if int(masked.sum()) != count:
            raise ConfigError(f"{int(masked.sum())} heads are masked where {count} were asked for")
    return configs


def summarise(runs: Sequence[MaskedRun], metric: str = "accuracy") -> list[dict[str, Any]]:
    """One row per number of heads: `num_heads`, `share`, `visual`, and of random heads `mean`, `std`, `low`, `high`.

    `visual_error` is the standard error over the documents. With no head masked, both sides are the whole model. `std`
    is the sample's (0 of a single seed).

    Raises:
        ConfigError: The metric is unknown.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
    rows = []
    for count in sorted({run.num_heads for run in runs}):
        mine = [run for run in runs if run.num_heads == count]
        visual = next((run for run in mine if run.kind in ("none", "visual")), None)
        drawn = [getattr(run, metric) for run in mine if run.kind in ("none", "random")]
        rows.append(
            {
                "num_heads": count,
                "share": mine[0].share,
                "visual": None if visual is None else getattr(visual, metric),
                "visual_error": None if visual is None else visual.error(metric),
                "mean": statistics.fmean(drawn) if drawn else None,
                "std": statistics.stdev(drawn) if len(drawn) > 1 else 0.0,
                "low": min(drawn, default=None),
                "high": max(drawn, default=None),
                "seeds": sum(run.kind == "random" for run in mine),
            }
        )
    return rows


def format_masking(runs: Sequence[MaskedRun]) -> str:
    """A Markdown table, one row per number of masked heads: accuracy and exact match, visual against random heads."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    columns = {
        "heads masked": lambda pair: str(pair[0]["num_heads"]),
        "share": lambda pair: f"{100 * pair[0]['share']:.1f} %",
        "visual: accuracy": lambda pair: number(pair[0]["visual"]),
        "random: accuracy": lambda pair: "{mean:.3f} ± {std:.3f}".format(**pair[0]) if pair[0]["seeds"] else "",
        "random: range": lambda pair: "{low:.3f}–{high:.3f}".format(**pair[0]) if pair[0]["seeds"] else "",
        "visual: exact": lambda pair: number(pair[1]["visual"]),
        "random: exact": lambda pair: number(pair[1]["mean"]),
    }
    return table_of(zip(summarise(runs), summarise(runs, "exact_match"), strict=True), columns, left=0)

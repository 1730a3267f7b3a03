"""The masking experiment: how much a model still reads without its visual heads, and without random others (spec 6)."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import sparsemm
from sparsemm.chase import weights_digest
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, DataError
from sparsemm.generation import generate_greedy, remember_image_features
from sparsemm.io import read_json, write_json_atomic
from sparsemm.metrics import METRICS, mean_metrics
from sparsemm.models import family_of
from sparsemm.results import environment

if TYPE_CHECKING:
    from sparsemm.documents import Page
    from sparsemm.head_scores import HeadScores

logger = logging.getLogger(__name__)

FORMAT = "sparsemm-masking"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MaskedRun:
    """What a model read with some heads masked.

    Attributes:
        kind: "none", "visual" (the highest scores) or "random" (seeded, outside of the visual ones).
        num_heads: How many query heads were masked.
        share: `num_heads` / all query heads.
        seed: Of a random choice, else None.
        accuracy, exact_match, anls: Means over the pages, 0..1.
        tasks: Accuracy on the pages of each task.
    """

    kind: str
    num_heads: int
    share: float
    seed: int | None
    accuracy: float
    exact_match: float
    anls: float
    tasks: dict[str, float]

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What tells a run from the others of its experiment."""
        return self.kind, self.num_heads, self.seed


def heads_of_shares(shares: Sequence[float], num_heads: int) -> list[int]:
    """Whole numbers of heads for shares between 0 and 1, rounded down as `mask_ratio` is; doubles once."""
    for share in shares:
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"share {share} of heads must lie between 0 and 1")
    return list(dict.fromkeys(int(share * num_heads + 1e-9) for share in shares))


def masking_experiment(
    model: nn.Module,
    processor: Any,
    pages: Sequence[Page],
    head_scores: HeadScores,
    *,
    num_heads: Sequence[int] = (0, 1, 2, 3, 4, 6, 8),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    mask_mode: str = "zero_query",
    batch_size: int = 16,
    max_new_tokens: int = 48,
    output: str | Path | None = None,
    fresh: bool = False,
    model_name: str | None = None,
    progress: bool = True,
) -> list[MaskedRun]:
    """Read `pages` with the highest-scoring heads masked, and with as many random other ones for each seed.

    Args:
        model, processor: From `sparsemm.load_model`; not patched.
        pages: With `image`, `prompt`, `answer`, `task`; not those that the scores were chased on.
        head_scores: Of this model.
        num_heads: How many heads to mask, in turn.
        seeds: Of the random choices.
        mask_mode: "zero_query" or "zero_output".
        batch_size: Pages generated together.
        max_new_tokens: Longest answer.
        output: Result file (JSON), complete after every run; a later call does only what is missing.
        fresh: Forget what `output` holds.
        model_name: Written in the results.
        progress: Show a progress bar.

    Raises:
        ConfigError: A number of heads cannot be masked, or at random outside of the visual ones.
        DataError: There is no page, or `output` holds another experiment.
    """
    from tqdm.auto import tqdm

    head_scores.check_shape(*_shape(model))
    configs = _configs(head_scores, num_heads, seeds, mask_mode)
    if not pages:
        raise DataError("there is no page to read")
    settings = {
        "model": model_name or Path(model.config.name_or_path).name or type(model).__name__,
        "weights": weights_digest(model),
        "head_scores": head_scores.describe(),
        "mask_mode": mask_mode,
        "documents": len(pages),
        "pages_digest": _digest(pages),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "environment": environment(model.device),
    }
    runs = {run.key: run for run in _resume(output, settings, fresh)}
    family = family_of(model)
    ordered = sorted(pages, key=lambda page: (page.task, page.num_words))
    chunks = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    batches = [
        (
            chunk,
            family.build_inputs(processor, [p.image for p in chunk], [p.prompt for p in chunk], device=model.device),
        )
        for chunk in chunks
    ]
    missing = [key for key in configs if key not in runs]
    with (
        torch.inference_mode(),
        remember_image_features(model, capacity=len(batches)),
        tqdm(total=len(missing) * len(pages), unit="page", disable=not progress) as bar,
    ):
        for key in missing:
            bar.set_description(f"{key[0]} {key[1]}")
            runs[key] = _run(model, processor, batches, key, configs[key], max_new_tokens, bar)
            if output is not None:
                ordered_runs = [asdict(runs[known]) for known in configs if known in runs]
                document = {"format": FORMAT, "version": FORMAT_VERSION, "settings": settings, "runs": ordered_runs}
                write_json_atomic(output, document)
    return [runs[key] for key in configs]


def _shape(model: nn.Module) -> tuple[int, int]:
    config = family_of(model).text_model(model).config
    return config.num_hidden_layers, config.num_attention_heads


def _configs(
    head_scores: HeadScores, num_heads: Sequence[int], seeds: Sequence[int], mask_mode: str
) -> dict[tuple[str, int, int | None], CompressionConfig]:
    """The configuration of every run; impossible ones are errors before anything is read."""
    from sparsemm.methods import masked_query_heads

    total = head_scores.values.numel()
    configs: dict[tuple[str, int, int | None], CompressionConfig] = {}
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
        masked = masked_query_heads(config, head_scores, *head_scores.values.shape)
        if int(masked.sum()) != count:
            raise ConfigError(f"{int(masked.sum())} heads are masked where {count} were asked for")
    return configs


def _run(
    model: nn.Module,
    processor: Any,
    batches: list[tuple[list[Page], Any]],
    key: tuple[str, int, int | None],
    config: CompressionConfig,
    max_new_tokens: int,
    bar: Any,
) -> MaskedRun:
    texts: list[str] = []
    pages: list[Page] = []
    with sparsemm.patch(model, config, reserve=max_new_tokens):
        for chunk, inputs in batches:
            tokens, _ = generate_greedy(model, inputs, max_new_tokens)
            texts += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            pages += chunk
            bar.update(len(chunk))
    tasks = {}
    for task in sorted({page.task for page in pages}):
        pairs = [(text, page.answer) for text, page in zip(texts, pages, strict=True) if page.task == task]
        tasks[task] = mean_metrics(*zip(*pairs, strict=True))["accuracy"]
    kind, count, seed = key
    share = count / config.head_scores.values.numel()
    return MaskedRun(kind, count, share, seed, **mean_metrics(texts, [page.answer for page in pages]), tasks=tasks)


def _digest(pages: Sequence[Page]) -> str:
    digest = hashlib.sha256()
    for page in pages:
        digest.update(f"{page.prompt}\0{page.answer}\0{page.image.size}\0".encode())
        digest.update(page.image.tobytes())
    return digest.hexdigest()[:16]


def _resume(output: str | Path | None, settings: dict[str, Any], fresh: bool) -> list[MaskedRun]:
    if output is None or fresh or not Path(output).exists():
        return []
    found, runs = load_masking(output)
    changed = sorted(name for name in {*found, *settings} - {"environment"} if found.get(name) != settings.get(name))
    if changed:
        raise DataError(
            f"{output} holds an experiment of other settings ({', '.join(changed)}); choose another output, or start "
            "over with --fresh"
        )
    return runs


def load_masking(path: str | Path) -> tuple[dict[str, Any], list[MaskedRun]]:
    """Settings and runs of a result file. Raises `DataError` when it is missing or is no such file."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is no result file of a masking experiment; choose another path")
    if document.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {document.get('version')!r}, not {FORMAT_VERSION}; run with --fresh"
        )
    try:
        return document["settings"], [MaskedRun(**values) for values in document["runs"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run with --fresh") from error


def summarise(runs: Sequence[MaskedRun], metric: str = "accuracy") -> list[dict[str, Any]]:
    """One row per number of heads: `num_heads`, `share`, `visual`, and of random heads `mean`, `std`, `low`, `high`.

    With no head masked, both sides are the whole model. `std` is the sample's (0 of a single seed).

    Raises:
        ConfigError: The metric is unknown.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
    rows = []
    for count in sorted({run.num_heads for run in runs}):
        mine = [run for run in runs if run.num_heads == count]
        visual = [getattr(run, metric) for run in mine if run.kind in ("none", "visual")]
        drawn = [getattr(run, metric) for run in mine if run.kind in ("none", "random")]
        rows.append(
            {
                "num_heads": count,
                "share": mine[0].share,
                "visual": visual[0] if visual else None,
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
    accuracy, exact = summarise(runs), summarise(runs, "exact_match")
    names = ("heads masked", "share", "visual: accuracy", "random: accuracy", "random: range", "visual: exact")
    header = [*names, "random: exact"]
    rows = []
    for row, other in zip(accuracy, exact, strict=True):
        drawn, span = "", ""
        if row["mean"] is not None:
            drawn, span = f"{row['mean']:.3f} ± {row['std']:.3f}", f"{row['low']:.3f}–{row['high']:.3f}"
        figures = [str(row["num_heads"]), f"{100 * row['share']:.1f} %", _number(row["visual"]), drawn, span]
        rows.append([*figures, _number(other["visual"]), _number(other["mean"])])
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        "| " + " | ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *rows]
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

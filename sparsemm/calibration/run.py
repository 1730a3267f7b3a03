"""The calibration over many pages: shared among processes, resumable, one file for every budget (spec section 10)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemm.calibration.curves import row_grid
from sparsemm.calibration.page import RANKINGS, QuestionPage, calibrate_page
from sparsemm.errors import ConfigError, DataError
from sparsemm.head_scores import Curves, HeadScores
from sparsemm.models import family_of
from sparsemm.models.identity import identity_of
from sparsemm.models.parallel import tensor_parallel_of
from sparsemm.runs.finished import make_once
from sparsemm.runs.results import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class _Ranking:
    """What SnapKV's ranking of positions is made with."""

    window_size: int
    kernel_size: int


def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Iterable[QuestionPage],
    *,
    window_size: int = 32,
    kernel_size: int = 5,
    max_new_tokens: int = 256,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    model_name: str | None = None,
    dataset: str | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Measure how much the answers depend on every head, and what every head loses with fewer rows (spec section 10).

    For `method="rate_distortion"`, and `head_kv` where pages say where answers stand (`words`, one of which is the
    `answer`); the result also serves every method that takes head scores, which are then
    max(0, -mean integrated gradient): what the head does for the answers. No training; a dozen pages are enough, of
    every kind of question that will be asked: what a head does for another kind is not seen.

    Beyond the model it needs the memory of one prompt's keys and values, and of one layer's attention of the answer's
    tokens with its gradients.

    Under `accelerate launch` (or torchrun) the processes share the pages; the result is that of one process.

    Args:
        model, processor: From `load_model`.
        pages: Pages with `image`, `prompt`, `answer` (None: the model's own greedy answer) and `task`, in a fixed
            order. Tasks weigh alike. An image that cannot be read is logged, skipped and counted.
        window_size, kernel_size: Of the compression to come: budgets can be had for this window and larger ones.
        max_new_tokens: Longest answer, in tokens.
        output: File of the result. Beside it, `<name>.pages.jsonl` holds what each page gave, as soon as it is known.
        resume: Continue from that file where there is one; an `output` made from as many pages or more, with the same
            settings, is left as it is, and returned. False starts again.
        model_name, dataset, seed: Provenance. The model's own name by default.
        progress: Show a progress bar.

    Returns:
        Scores `[num_layers, num_query_heads]` with their curves and provenance; saved as `output` if given.

    Raises:
        ConfigError: A setting is out of range, or several processes and no `output`.
        DataError: The file to resume from, or `output`, is of another calibration, or no page could be used.
        HeadScoreError: No head does anything for the answers.
    """
    for name, value, least in (("window_size", window_size, 1), ("max_new_tokens", max_new_tokens, 2)):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size={kernel_size} must be odd; pooling is centred")
    if tensor_parallel_of(model).size > 1:
        raise ConfigError(
            "a calibration takes gradients through the gates of all heads, which tensor parallelism does not offer; "
            "load the model in one process (device=auto spreads a large one over the GPUs)"
        )
    ranking = _Ranking(window_size, kernel_size)
    identity = identity_of(model)
    settings: dict[str, Any] = {
        "model": model_name or identity.name,
        "weights": identity.weights,
        "dataset": dataset,
        "seed": seed,
        "window_size": window_size,
        "kernel_size": kernel_size,
        "max_new_tokens": max_new_tokens,
        "rankings": list(RANKINGS),
        "num_kv_heads": family_of(model).text_model(model).config.num_key_value_heads,
    }
    return make_once(
        pages,
        lambda page: calibrate_page(model, processor, page, ranking, max_new_tokens=max_new_tokens),
        lambda records: _collect(records, settings),
        load=HeadScores.load,
        output=output,
        journal=None if output is None else journal_path(output),
        settings=settings,
        resume=resume,
        label="calibrate",
        progress=progress,
    )


def journal_path(output: str | os.PathLike[str]) -> Path:
    """Where `calibrate` keeps what each page gave, beside its `output`."""
    return Path(output).with_suffix(".pages.jsonl")


def _collect(records: list[dict[str, Any]], settings: dict[str, Any]) -> HeadScores:
    used = [record for record in records if "skipped" not in record]
    if not used:
        raise DataError(f"none of {len(records)} pages could be used; see the log for the reasons")
    rows = row_grid(settings["window_size"], max(record["prompt_tokens"] for record in used))
    gradients, sensitivities, lost = [], [], {name: [] for name in RANKINGS}
    tasks = {task: [record for record in used if record["task"] == task] for task in {each["task"] for each in used}}
    for task in sorted(tasks):
        integrated = _stack(tasks[task], "gradients")
        gradients.append(integrated.mean(0))
        sensitivities.append(integrated.abs().mean(0))
        for name in RANKINGS:
            lost[name].append(_curves(tasks[task], name, len(rows)).mean(0))
    needles = [record for record in used if record["retrieval"] is not None]
    provenance = {
        **settings,
        "num_pages": len(used),
        "num_skipped": len(records) - len(used),
        "tasks": {task: len(tasks[task]) for task in sorted(tasks)},
        "num_tokens": sum(record["answer_tokens"] for record in used),
        "num_needles": len(needles),
        "versions": versions(),
    }
    relative = {name: _relative(_mean(each)) for name, each in lost.items()}
    retrieval = _stack(needles, "retrieval").mean(0) if needles else None
    curves = Curves(rows, _mean(sensitivities), retrieval=retrieval, **relative)
    return HeadScores((-_mean(gradients)).clamp(min=0), curves=curves, **provenance)


def _stack(records: list[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([torch.tensor(record[name], dtype=torch.float64) for record in records])


def _relative(lost: Tensor) -> Tensor:
    """Curves divided by what is lost with the window alone."""
    least = lost[..., :1]
    return torch.where(least > 0, lost / least, 0.0)


def _curves(records: list[dict[str, Any]], name: str, points: int) -> Tensor:
    """All pages' curves on one grid; nothing is lost where a page has no more rows."""
    curves = [torch.tensor(record[name], dtype=torch.float64) for record in records]
    return torch.stack([torch.nn.functional.pad(curve, (0, points - curve.shape[-1])) for curve in curves])


def _mean(tables: list[Tensor]) -> Tensor:
    return torch.stack(tables).mean(0)

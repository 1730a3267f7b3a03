"""`sparsemm calibrate`: measure how many rows every head needs, for the methods that need a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.chase import PAGE_SEED, place_of
from sparsemm.cli.common import LARGE, SMALL, WIDE
from sparsemm.cli.options import DividedModel, FreshOption, Model, NewTokensOption, PixelsOption, QuietOption
from sparsemm.cli.outputs import claim
from sparsemm.errors import DataError

NOT_TOGETHER = "a calibration runs in one process; device=auto spreads a large model over the GPUs"


def calibrate(
    *,
    model: DividedModel,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with questions.jsonl, hub id, or miniature: its generator [default for miniatures: miniature]."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train",
    num_pages: Annotated[int, typer.Option("--pages", min=1, help="At most so many pages.")] = 64,
    window_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Window of the compression [default: {LARGE.window_size}, miniatures {SMALL.window_size} or "
            f"{WIDE.window_size}].",
        ),
    ] = None,
    kernel_size: Annotated[int, typer.Option(min=1, help="Width of the pooling of position scores.")] = 5,
    seed: Annotated[int, typer.Option(help="Generator: another seed draws other pages.")] = PAGE_SEED,
    max_new_tokens: NewTokensOption = 256,
    max_pixels: PixelsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File [default: calibration.json of a local checkpoint, or head_scores/calibrations/<model>.json]."
        ),
    ] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
) -> None:
    """Measure how much answers depend on every head, and what it loses with fewer rows.

    Mix the kinds of questions that will be asked. An interrupted calibration goes on where it stopped. Several GPUs:
    accelerate launch -m sparsemm calibrate ...
    """
    from sparsemm.calibration import calibrate as measure
    from sparsemm.runs.processes import workers

    if data is None and not model.is_miniature:
        raise DataError("give the pages to calibrate on with --data: a folder with questions.jsonl, or a hub id")
    file = output or place_of(model.model, calibrated=True)
    claim(file)
    name = data or "miniature"
    pages = _pages(model, name, split, num_pages, seed)
    network, processor = model.load(device=model.device or workers().device, max_pixels=max_pixels)
    scores = measure(
        network,
        processor,
        pages,
        window_size=window_size or model.defaults.window_size,
        kernel_size=kernel_size,
        max_new_tokens=max_new_tokens,
        output=file,
        resume=not fresh,
        model_name=model.name if model.is_miniature or Path(model.model).is_dir() else model.model,
        dataset=Path(name).name if Path(name).exists() else name,
        seed=seed if name == "miniature" else None,
        progress=not no_progress,
    )
    if workers().first:
        figures = scores.provenance
        tasks = ", ".join(f"{count} {task}" for task, count in figures["tasks"].items())
        typer.echo(f"{file}: {scores.num_layers} layers x {scores.num_query_heads} query heads")
        typer.echo(f"{figures['num_pages']} pages used ({tasks}), {figures['num_skipped']} skipped")


def _pages(model: Model, name: str, split: str, count: int, seed: int) -> Any:
    from sparsemm.datasets import open_questions
    from sparsemm.experiments.session import heldout_pages

    if name != "miniature":
        return open_questions(name, split=split, limit=count)
    suits = model.defaults
    return heldout_pages(count, num_words=suits.num_words, seed=seed, size=suits.page_size)

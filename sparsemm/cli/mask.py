"""`sparsemm mask`: the masking experiment, visual heads against random others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    FreshOption,
    HeadScoresOption,
    MaskMode,
    MaskModeOption,
    ModelOption,
    PageSeedOption,
    QuietOption,
    TasksOption,
    TokensOption,
    WordsOption,
    find_head_scores,
    is_miniature,
    load,
    pages_for,
    parse_integers,
    parse_list,
    short_name,
)
from sparsemm.errors import ConfigError, DataError

MINIATURE_HEADS = "0,1,2,3,4,6,8"
SHARES = "0,1,2,5,10,20"


def mask(
    model: ModelOption = DEFAULT_MODEL,
    heads: Annotated[
        str | None, typer.Option(help=f"How many heads to mask, in turn [default: miniatures {MINIATURE_HEADS}].")
    ] = None,
    shares: Annotated[str | None, typer.Option(help=f"The same as percentages [default: {SHARES}].")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the random heads.")] = "0,1,2,3,4",
    documents: DocumentsOption = 64,
    tasks: TasksOption = "read,field",
    num_words: WordsOption = "1,2,3,4",
    page_seed: PageSeedOption = 0,
    page_size: Annotated[int, typer.Option(help="Side of a page in pixels, a multiple of 16.")] = 224,
    head_scores: HeadScoresOption = None,
    mask_mode: MaskModeOption = MaskMode.zero_query,
    metric: Annotated[str, typer.Option(help="What to plot: accuracy, exact_match, anls.")] = "accuracy",
    batch_size: BatchOption = 16,
    max_new_tokens: TokensOption = 48,
    output: Annotated[
        Path | None, typer.Option(help="Folder of masking.json and masking.png [default: results/masking/<model>].")
    ] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read held-out pages with the visual heads masked, and with as many random others. Table, JSON and plot."""
    from sparsemm import HeadScores
    from sparsemm.experiments.masking import format_masking, heads_of_shares, masking_experiment, summarise
    from sparsemm.runs.metrics import METRIC_LABELS
    from sparsemm.viz.heads import draw_masking

    if heads is not None and shares is not None:
        raise ConfigError("give --heads or --shares, not both")
    if metric not in METRIC_LABELS:
        raise ConfigError(f"--metric {metric!r} is unknown; use one of {', '.join(METRIC_LABELS)}")
    file = find_head_scores(model, head_scores)
    if file is None:
        raise DataError(f"there are no head scores of {short_name(model)}; chase them, or give --head-scores")
    scores = HeadScores.load(file)
    if heads is None and shares is None and is_miniature(model):
        heads = MINIATURE_HEADS
    if heads is not None:
        counts = parse_integers(heads, "--heads")
    else:
        counts = heads_of_shares(_percentages(shares or SHARES), scores.values.numel())
    folder = output or Path("results") / "masking" / short_name(model)
    pages = pages_for(documents, tasks, num_words, page_seed, size=page_size)
    network, processor = load(model, device=device, dtype=dtype)
    runs = masking_experiment(
        network,
        processor,
        pages,
        scores,
        num_heads=counts,
        seeds=parse_integers(seeds, "--seeds"),
        mask_mode=mask_mode.value,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=folder / "masking.json",
        fresh=fresh,
        model_name=short_name(model),
        progress=not no_progress,
    )
    typer.echo(format_masking(runs))
    title = f"Masked heads, {short_name(model)}: {documents} held-out pages, {mask_mode.value}"
    draw_masking(summarise(runs, metric), folder / "masking.png", label=METRIC_LABELS[metric], title=title)
    typer.echo(f"\nresults: {folder / 'masking.json'}\nplot:    {folder / 'masking.png'}")


def _percentages(text: str) -> list[float]:
    try:
        return [float(part) / 100 for part in parse_list(text)]
    except ValueError:
        raise ConfigError(f"--shares {text!r} are not percentages separated by commas") from None

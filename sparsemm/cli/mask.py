"""`sparsemm mask`: the masking experiment, visual heads against random others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import SMALL, WIDE, file_name, listed, parse_integers, parse_list
from sparsemm.cli.options import FormatOption, MaskModeOption, Metric, Model, Reading, Scores
from sparsemm.cli.outputs import claim
from sparsemm.errors import ConfigError

SHARES = "0,1,2,5,10,20"


def mask(
    *,
    model: Model,
    heads: Annotated[
        str | None,
        typer.Option(
            help=f"How many heads to mask, in turn [default: miniatures {listed(SMALL.masked_heads)}, or "
            f"{listed(WIDE.masked_heads)}]."
        ),
    ] = None,
    shares: Annotated[str | None, typer.Option(help=f"The same as percentages [default: {SHARES}].")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the random heads.")] = "0,1,2,3,4",
    scores: Scores,
    mask_mode: MaskModeOption = "zero_query",
    reading: Reading,
    metric: Annotated[Metric, typer.Option(help="What to plot.")] = "accuracy",
    output: Annotated[
        Path | None, typer.Option(help="Folder of masking.json and masking.png [default: results/masking/<model>].")
    ] = None,
    format: FormatOption = None,
) -> None:
    """Read held-out pages with the visual heads masked, and with as many random others. Table, JSON and plot."""
    from sparsemm.experiments.masking import format_masking, heads_of_shares, masking_experiment, summarise
    from sparsemm.experiments.session import PageReader
    from sparsemm.runs.metrics import METRIC_LABELS
    from sparsemm.runs.plots import save_figure
    from sparsemm.viz.heads import draw_masking

    if heads is not None and shares is not None:
        raise ConfigError("give --heads or --shares, not both")
    table = scores.table(model.model)
    if heads is not None:
        counts = parse_integers(heads, "--heads")
    elif shares is None and model.defaults.masked_heads is not None:
        counts = list(model.defaults.masked_heads)
    else:
        counts = heads_of_shares(_percentages(shares or SHARES), table.values.numel())
    folder = output or Path("results") / "masking" / model.name
    picture = folder / f"{file_name('masking', None if metric == 'accuracy' else metric)}.png"
    claim(folder / "masking.json", picture)
    random = parse_integers(seeds, "--seeds")
    pages = reading.pages(model)
    reader = PageReader(*model.load(), pages, output=folder / "masking.json", model_name=model.name, **reading.how)
    runs = masking_experiment(reader, table, num_heads=counts, seeds=random, mask_mode=mask_mode)
    typer.echo(format_masking(runs))
    title = f"Masked heads, {model.name}: {reading.documents} held-out pages, {mask_mode}"
    figure = draw_masking(summarise(runs, metric), label=METRIC_LABELS[metric], title=title)
    save_figure(figure, picture, format)
    typer.echo(f"\nresults: {folder / 'masking.json'}\nplot:    {picture}")


def _percentages(text: str) -> list[float]:
    try:
        return [float(part) / 100 for part in parse_list(text)]
    except ValueError:
        raise ConfigError(f"--shares {text!r} are not percentages separated by commas") from None

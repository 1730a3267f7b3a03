"""`sparsemm tables`: what lmms-eval measured, as the paper's tables and its main figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsemm.cli.common import parse_integers, parse_list
from sparsemm.cli.options import Rounding
from sparsemm.cli.outputs import claim, claim_picture


def tables(
    results: Annotated[list[Path], typer.Argument(help="Result files of lmms-eval, or folders of them.")],
    form: Annotated[
        Literal["markdown", "csv", "latex", "json"], typer.Option("--format", help="Of what is printed.")
    ] = "markdown",
    only: Annotated[str, typer.Option("--tables", help="Which tables of the paper.")] = "1,2,3,4",
    whole: Annotated[bool, typer.Option("--all", help="Also parts of which nothing was measured.")] = False,
    ratio: Annotated[float, typer.Option(help="The ratio of SparseMM's cells in Tables 2 to 4.")] = 0.1,
    rounding: Annotated[Rounding | None, typer.Option(help="Only cells of this rounding.")] = None,
    windows: Annotated[str | None, typer.Option(help="Only cells of these window sizes, such as 8,12.")] = None,
    metric: Annotated[str | None, typer.Option(help="Another metric, for the tasks that have it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for all four formats and the figure.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file of the main figure.")] = None,
    collect: Annotated[Path | None, typer.Option(help="JSON file for all cells, readable by this command.")] = None,
) -> None:
    """Print the paper's Tables 1 to 4, every measured cell beside the paper's figure and the difference."""
    from sparsemm.io import write_bytes_atomic
    from sparsemm.tables import build_tables, plot_budgets, read_measurements, render_tables
    from sparsemm.tables.measurements import write_measurements
    from sparsemm.tables.render import ENDINGS

    if output is not None:
        claim(*(output / f"tables.{ending}" for ending in ENDINGS.values()))
        plot = plot or output / "budgets.png"
    claim(collect)
    claim_picture(plot)
    sizes = None if windows is None else parse_integers(windows, "--windows")
    cells = read_measurements(results, rounding=rounding, windows=sizes)
    built = build_tables(cells, numbers=parse_list(only), ratio=ratio, metric=metric, whole=whole)
    typer.echo(render_tables(built, form), nl=False)
    if collect is not None:
        write_measurements(cells, collect)
    if output is not None:
        for name, ending in ENDINGS.items():
            write_bytes_atomic(output / f"tables.{ending}", render_tables(built, name).encode())
    if plot is not None:
        plot_budgets(built, plot)

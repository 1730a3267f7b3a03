"""The `sparsemm` program. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparsemm.cli import bench, chase, data, evaluate, generate, head_rows, head_scores, mask, miniatures, tables, viz
from sparsemm.cli.common import quiet
from sparsemm.errors import SparseMMError

app = typer.Typer(
    name="sparsemm",
    help="Visual heads and per-head key/value caches for vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup would swallow "[default: ...]"
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(evaluate.quickstart)
app.command()(chase.chase)
app.command()(mask.mask)
app.command("head-rows")(head_rows.head_rows)
app.command()(tables.tables)
app.add_typer(head_scores.app, name="head-scores")
app.add_typer(data.app, name="data")
app.add_typer(viz.app, name="viz")
app.add_typer(miniatures.app, name="miniatures")
app.add_typer(bench.app, name="bench")


def _show_version(value: bool) -> None:
    if value:
        import sparsemm

        typer.echo(sparsemm.__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the library does.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Visual heads and per-head key/value caches for vision-language models."""
    quiet(verbose)


def main() -> None:
    """Console entry point. Errors of the package end it with one line and status 2."""
    try:
        app(prog_name="sparsemm")
    except SparseMMError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)

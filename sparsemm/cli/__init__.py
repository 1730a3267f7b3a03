"""The `sparsemm` program. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsemm.cli import (
    bench,
    calibrate,
    chase,
    data,
    evaluate,
    generate,
    head_rows,
    head_scores,
    mask,
    miniatures,
    models,
    tables,
    viz,
)
from sparsemm.cli.common import quiet
from sparsemm.cli.program import Program, run_program

app = Program(help="Visual heads and per-head key/value caches for vision-language models.")
for command in (
    generate.generate, evaluate.evaluate, evaluate.report, evaluate.quickstart, chase.chase,
    mask.mask, head_rows.head_rows, tables.tables, models.models,
):  # fmt: skip
    app.command()(command)
app.command(alone=calibrate.NOT_TOGETHER)(calibrate.calibrate)
for name, room in {
    "head-scores": head_scores, "data": data, "viz": viz, "miniatures": miniatures, "bench": bench,
}.items():  # fmt: skip
    app.add_typer(room.app, name=name)


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
    """Console entry point."""
    run_program(app, "sparsemm")

"""`sparsemm bench`: time what runs on this machine."""

from __future__ import annotations

import typer

from sparsemm.cli import bench_chase, bench_e2e, bench_kernels

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Time the operators of this package.")


@app.callback()
def options() -> None:
    """Time the operators of this package."""


app.command()(bench_chase.chase)
app.command()(bench_kernels.kernels)
app.command()(bench_e2e.e2e)
app.command()(bench_e2e.host)

"""`sparsemm bench`: time what runs on this machine."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Time the operators of this package.")


@app.callback()
def options() -> None:
    """Time the operators of this package."""

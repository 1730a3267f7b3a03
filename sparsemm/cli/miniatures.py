"""`sparsemm miniatures`: train the small checkpoints of the repository, and measure how well they read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsemm.cli.common import DEFAULT_MODEL, MINIATURES, resolve_model
from sparsemm.cli.options import JsonOption
from sparsemm.cli.program import Program

app = Program(help="Train and evaluate the miniatures.")
FamilyOption = Annotated[Literal[MINIATURES], typer.Option(help="Which miniature.")]
FolderOption = Annotated[Path | None, typer.Option(help="Checkpoints [default: runs/miniatures/<family>].")]


@app.command()
def train(
    family: FamilyOption,
    folder: FolderOption = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and pages.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's checkpoint.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Train a miniature from nothing; stop it at any time and go on with --resume."""
    import torch

    from sparsemm.miniatures.train import train as run

    logging.getLogger("sparsemm").setLevel(logging.INFO)
    if threads is not None:
        torch.set_num_threads(threads)
    typer.echo(run(family, folder=folder, seed=seed, resume=resume))


@app.command()
def export(
    family: FamilyOption,
    folder: FolderOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write [default: <folder>/export].")] = None,
    pages: Annotated[int, typer.Option(min=1, help="Held-out pages for each number of words.")] = 50,
) -> None:
    """Write a run's weights, its reading of held-out pages and its card as a folder that every command takes."""
    from sparsemm.miniatures.export import export as run

    source = folder or Path("runs/miniatures") / family
    typer.echo(run(family, source, output or source / "export", pages=pages)["summary"])


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", help="A miniature's name or folder.")] = DEFAULT_MODEL,
    pages: Annotated[int, typer.Option(min=1, help="Pages for each number of words.")] = 50,
    split: Annotated[str, typer.Option(help="heldout or train.")] = "heldout",
    output: JsonOption = None,
) -> None:
    """Measure how well a miniature reads, by task and number of words, with the full cache."""
    from sparsemm.io import write_json_atomic
    from sparsemm.miniatures.reading import read_pages

    reading = read_pages(resolve_model(model), pages=pages, split=split)
    for task, rows in reading["tasks"].items():
        for count, row in rows.items():
            typer.echo(
                f"{task:5s} {count:>2s}: accuracy {row['accuracy']:.3f}, exact match {row['exact_match']:.3f}, "
                f"ANLS {row['anls']:.3f}"
            )
    if output is not None:
        write_json_atomic(output, reading)

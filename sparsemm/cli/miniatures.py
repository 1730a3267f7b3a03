"""`sparsemm miniatures`: train the small checkpoints of the repository, and measure how well they read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsemm.cli.common import DEFAULT_MODEL, MINIATURES, defaults_of, resolve_model
from sparsemm.cli.options import FreshOption, JsonOption, QuietOption
from sparsemm.cli.outputs import claim, claim_folder
from sparsemm.cli.program import Program

app = Program(help="Train and evaluate the miniatures.")
FamilyOption = Annotated[Literal[tuple(MINIATURES)], typer.Option(help="Which miniature.")]
FolderOption = Annotated[Path | None, typer.Option(help="Checkpoint [default: runs/miniatures/<family>].")]
ExportOption = Annotated[Path | None, typer.Option(help="Folder to write the model to [default: <folder>/<family>].")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of weights and pages.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads; another number gives slightly other weights.")]
PagesOption = Annotated[int, typer.Option(min=1, help="Held-out pages for each number of words.")]


@app.command()
def train(
    family: FamilyOption,
    folder: FolderOption = None,
    output: ExportOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="End this run after so many; the next goes on.")] = None,
    fresh: FreshOption = False,
    pages: PagesOption = 50,
    no_progress: QuietOption = False,
) -> None:
    """Train a miniature from nothing to a folder that every command takes; run it again to go on where it stopped."""
    from sparsemm.miniatures.export import export as write
    from sparsemm.miniatures.train import train as run

    if no_progress:  # what it would have shown is logged
        logging.getLogger("sparsemm").setLevel(logging.INFO)
    folder = folder or Path("runs/miniatures") / family
    claim_folder(folder)
    claim_folder(output or folder / family)
    try:
        trainer = run(family, folder, seed=seed, threads=threads, steps=steps, fresh=fresh, progress=not no_progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from {folder}, at most a minute earlier", err=True)
        raise typer.Exit(130) from None
    if trainer.stage is None:
        typer.echo(write(trainer, output or folder / family, pages=pages)["summary"])
    else:
        typer.echo(
            f"{trainer.progress.total_steps} steps done, in stage {trainer.stage.name}; the same command goes on"
        )


@app.command()
def export(
    family: FamilyOption,
    folder: FolderOption = None,
    output: ExportOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    pages: PagesOption = 50,
) -> None:
    """Write an unfinished run's weights as they are, with their reading of held-out pages and a card."""
    from sparsemm.miniatures.export import export as write
    from sparsemm.miniatures.train import Trainer

    folder = folder or Path("runs/miniatures") / family
    trainer = Trainer(family, folder, seed=seed, threads=threads)
    trainer.load()
    typer.echo(write(trainer, output or folder / family, pages=pages)["summary"])


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", help="A miniature's name or folder.")] = DEFAULT_MODEL,
    pages: PagesOption = 50,
    split: Annotated[Literal["heldout", "train"], typer.Option(help="Words and typefaces.")] = "heldout",
    output: JsonOption = None,
) -> None:
    """Measure how well a miniature reads, by task and number of words, with the full cache."""
    from sparsemm.io import write_json_atomic
    from sparsemm.miniatures.reading import read_pages

    claim(output)
    reading = read_pages(resolve_model(model), pages=pages, size=defaults_of(model).page_size, split=split)
    for task, rows in reading["tasks"].items():
        for count, row in rows.items():
            typer.echo(
                f"{task:5s} {count:>2s}: accuracy {row['accuracy']:.3f}, exact match {row['exact_match']:.3f}, "
                f"ANLS {row['anls']:.3f}"
            )
    if output is not None:
        write_json_atomic(output, reading)

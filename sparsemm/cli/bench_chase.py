"""`sparsemm bench chase`: what chasing costs beside plain generation."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsemm.cli.chase import PAGE_SEED, default_match
from sparsemm.cli.options import JsonOption, Model, NewTokensOption, QuietOption
from sparsemm.cli.outputs import claim


def chase(
    *,
    model: Model,
    dataset: Annotated[str, typer.Option(help="As for `sparsemm chase`.")] = "miniature",
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; their median counts.")] = 5,
    max_new_tokens: NewTokensOption = 64,
    output: JsonOption = None,
    no_progress: QuietOption = False,
) -> None:
    """Time reading pages plainly, while chasing, and in a loop over whole attention matrices."""
    import itertools

    from sparsemm.bench.chase import run
    from sparsemm.datasets import open_pages

    claim(output)
    pages = list(itertools.islice(open_pages(dataset, limit=num_images, seed=PAGE_SEED), num_images))
    results = run(
        *model.load(), pages, model_name=model.name, output=output, match=default_match(model),
        max_new_tokens=max_new_tokens, repeats=repeats, progress=not no_progress,
    )  # fmt: skip
    (cell,) = results.runs
    for name, label in (("plain", "plain generation"), ("chase", "chase"), ("loop", "loop over attention matrices")):
        typer.echo(f"{label:<30}{cell.ms(name) / len(pages):9.1f} ms/image")
    typer.echo(f"{'chase / plain':<30}{cell.figures['chase_over_plain']:9.2f}")
    typer.echo(f"{'loop / chase':<30}{cell.figures['loop_over_chase']:9.2f}")
    typer.echo(f"{model.name}, {len(pages)} images, {cell.figures['tokens']} tokens")

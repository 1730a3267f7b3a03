"""`sparsemm bench chase`: what chasing costs beside plain generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.chase import PAGE_SEED, default_match
from sparsemm.cli.common import DEFAULT_MODEL, DeviceOption, DtypeOption, ModelOption, load, short_name


def chase(
    model: ModelOption = DEFAULT_MODEL,
    dataset: Annotated[str, typer.Option(help="As for `sparsemm chase`.")] = "miniature",
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; of each image the fastest counts.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reading.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Time reading pages plainly, while chasing, and in a loop over whole attention matrices."""
    import itertools

    from sparsemm.bench.chase import chase_cost
    from sparsemm.datasets import open_pages
    from sparsemm.io import write_json_atomic

    pages = list(itertools.islice(open_pages(dataset, limit=num_images, seed=PAGE_SEED), num_images))
    network, processor = load(model, device=device, dtype=dtype)
    figures = chase_cost(
        network, processor, pages, match=default_match(model), max_new_tokens=max_new_tokens, repeats=repeats,
        progress=not no_progress,
    )  # fmt: skip
    for name, label in (("plain", "plain generation"), ("chase", "chase"), ("loop", "loop over attention matrices")):
        typer.echo(f"{label:<30}{1000 * figures[f'{name}_seconds'] / figures['pages']:9.1f} ms/image")
    typer.echo(f"{'chase / plain':<30}{figures['chase_over_plain']:9.2f}")
    typer.echo(f"{'loop / chase':<30}{figures['loop_over_chase']:9.2f}")
    typer.echo(f"{short_name(model)}, {figures['pages']} images, {figures['tokens']} tokens")
    if output is not None:
        write_json_atomic(output, {"model": short_name(model), **figures})

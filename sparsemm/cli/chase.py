"""`sparsemm chase`: find the visual heads of a model on synthetic pages."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    is_miniature,
    load,
    parse_integers,
    short_name,
)

PAGE_SEED = 1  # the pages of `evaluate` have seed 0: heads are not chosen on the pages they are judged by


class Match(str, Enum):
    """How a generated token finds its word on the page."""

    unique = "unique"
    aligned = "aligned"


def chase(
    model: ModelOption = DEFAULT_MODEL,
    pages: Annotated[int, typer.Option(min=1, help="Number of pages; the paper took 1000.")] = 200,
    num_words: Annotated[str, typer.Option(help="Words of a page, taking turns.")] = "1,2,3,4",
    page_size: Annotated[int, typer.Option(help="Side of a page in pixels, a multiple of 16.")] = 224,
    seed: Annotated[int, typer.Option(help="Another seed draws other pages.")] = PAGE_SEED,
    match: Annotated[
        Match | None,
        typer.Option(help="unique is the paper's rule; aligned suits one-character tokens [default: by the model]."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reading of a page.")] = 1024,
    output: Annotated[
        Path | None, typer.Option(help="Score file [default: head_scores/<name of the model>.json].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing a run.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Let the model read pages and score every head by how often it looks at the word being read."""
    target = output or Path("head_scores") / f"{short_name(model)}.json"
    network, processor = load(model, device=device, dtype=dtype)
    run_chase(
        network,
        processor,
        target,
        model_name=short_name(model) if is_miniature(model) else model,
        pages=pages,
        num_words=parse_integers(num_words, "--num-words"),
        page_size=page_size,
        seed=seed,
        match=default_match(model) if match is None else match.value,
        max_new_tokens=max_new_tokens,
        resume=not fresh,
        progress=not no_progress,
    )


def default_match(model: str) -> str:
    """`aligned` for miniatures, whose one-character tokens occur in many words; otherwise `unique`, as in the paper."""
    return "aligned" if is_miniature(model) else "unique"


def run_chase(
    network: Any,
    processor: Any,
    output: Path,
    *,
    model_name: str,
    pages: int,
    match: str,
    num_words: Sequence[int] = (1, 2, 3, 4),
    page_size: int = 224,
    seed: int = PAGE_SEED,
    max_new_tokens: int = 1024,
    resume: bool = True,
    progress: bool = True,
) -> None:
    """Chase on held-out pages, save the scores, and print how sparse they are."""
    from sparsemm.chase import chase as chase_heads
    from sparsemm.evaluate import heldout_pages

    words = tuple(num_words)
    scores = chase_heads(
        network,
        processor,
        heldout_pages(pages, tasks=("read",), num_words=words, seed=seed, size=page_size),
        match=match,
        max_new_tokens=max_new_tokens,
        output=output,
        resume=resume,
        model_name=model_name,
        dataset=f"synthetic held-out pages, {page_size} pixels, {words} words",
        seed=seed,
        progress=progress,
    )
    typer.echo(f"{output}: {scores.num_layers} layers x {scores.num_query_heads} query heads")
    typer.echo(f"top 5 % of the heads hold {100 * scores.top_share(0.05):.1f} % of the score")

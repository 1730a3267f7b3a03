"""`sparsemm chase`: find the visual heads of a model on images with text boxes."""

from __future__ import annotations

from collections.abc import Iterable
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
from sparsemm.cli.data import (
    FontsOption,
    FormatOption,
    ImagesOption,
    PageSizeOption,
    SourceHelp,
    SplitOption,
    UnitOption,
    open_source,
)
from sparsemm.errors import ConfigError

PAGE_SEED = 1  # the pages of `evaluate` have seed 0: heads are not chosen on the pages they are judged by


class Match(str, Enum):
    """How a generated token finds its word on the page."""

    unique = "unique"
    aligned = "aligned"


def chase(
    model: ModelOption = DEFAULT_MODEL,
    dataset: Annotated[
        str | None, typer.Option(help=f"{SourceHelp} [default: documents; for miniatures, miniature].")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", "--pages", min=1, help="At most so many [default: 1000, miniatures 200]."),
    ] = None,
    match: Annotated[
        Match | None,
        typer.Option(help="unique is the paper's rule; aligned suits one-character tokens [default: by the model]."),
    ] = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    split: SplitOption = "train",
    unit: UnitOption = None,
    num_words: Annotated[
        str | None, typer.Option(help="Words of a miniature's page, taking turns [default: 1,2,3,4].")
    ] = None,
    page_size: PageSizeOption = None,
    fonts: FontsOption = None,
    seed: Annotated[int, typer.Option(help="Generators: another seed draws other pages.")] = PAGE_SEED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reading of a page.")] = 1024,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked [default: the paper's].")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image area (Qwen2-VL).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Score file [default: head_scores/<name of the model>.json].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing a run.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Let the model read pages and score every head by how often it looks at the word being read.

    An interrupted chase goes on where it stopped. Several GPUs: accelerate launch -m sparsemm chase ...
    """
    from sparsemm.runs.processes import workers

    source = dataset or ("miniature" if is_miniature(model) else "documents")
    limit = num_images or (200 if is_miniature(model) else 1000)
    words = None if num_words is None else tuple(parse_integers(num_words, "--num-words"))
    pages = open_source(
        source, format=format, images=images, split=split, limit=limit, seed=seed, page_size=page_size, unit=unit,
        fonts=fonts, num_words=words,
    )  # fmt: skip
    if max_pixels is not None and max_pixels < 1:
        raise ConfigError(f"--max-pixels {max_pixels} must be at least 1")
    network, processor = load(
        model,
        device=device or workers().device,
        dtype=dtype,
        **({} if max_pixels is None else {"max_pixels": max_pixels}),
    )
    details = {"pixels": page_size, "words": num_words, "unit": None if unit is None else unit.value, "fonts": fonts}
    run_chase(
        network,
        processor,
        output or Path("head_scores") / f"{short_name(model)}.json",
        model_name=short_name(model) if is_miniature(model) or Path(model).is_dir() else model,
        pages=pages,
        dataset=_describe(source, split, details),
        seed=seed,
        match=default_match(model) if match is None else match.value,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        resume=not fresh,
        progress=not no_progress,
    )


def default_match(model: str) -> str:
    """`aligned` for miniatures, whose one-character tokens occur in many words; otherwise `unique`, as in the paper."""
    return "aligned" if is_miniature(model) else "unique"


def _describe(source: str, split: str, details: dict[str, Any]) -> str:
    """The data set as the score file names it: without folders, which mean nothing elsewhere."""
    name = Path(source).name if Path(source).exists() else source
    given = [f"{key} {value}" for key, value in details.items() if value is not None]
    return ", ".join([name, *given] if split == "train" else [name, f"split {split}", *given])


def run_chase(
    network: Any,
    processor: Any,
    output: Path,
    *,
    model_name: str,
    pages: int | Iterable[Any],
    match: str,
    dataset: str = "miniature",
    seed: int = PAGE_SEED,
    max_new_tokens: int = 1024,
    prompt: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> None:
    """Chase on `pages`, or on so many of a miniature's; save the scores, and print how sparse they are."""
    from sparsemm.chase import READ_PROMPT
    from sparsemm.chase import chase as chase_heads
    from sparsemm.datasets import open_pages
    from sparsemm.runs.processes import workers

    scores = chase_heads(
        network,
        processor,
        open_pages("miniature", limit=pages, seed=seed) if isinstance(pages, int) else pages,
        match=match,
        max_new_tokens=max_new_tokens,
        prompt=prompt or READ_PROMPT,
        output=output,
        resume=resume,
        model_name=model_name,
        dataset=dataset,
        seed=seed,
        progress=progress,
    )
    if workers().first:
        figures = scores.provenance
        typer.echo(f"{output}: {scores.num_layers} layers x {scores.num_query_heads} query heads")
        if "num_images" in figures:
            typer.echo(
                f"{figures['num_images']} images read, {figures['num_skipped']} skipped; {figures['num_tokens']} "
                f"tokens, {figures['num_matched']} matched, {figures['num_hits']} hits"
            )
        typer.echo(f"top 5 % of the heads hold {100 * scores.top_share(0.05):.1f} % of the score")

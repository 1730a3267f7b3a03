"""`sparsemm chase`: find the visual heads of a model on images with text boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsemm.cli.common import LARGE, parse_integers, score_files
from sparsemm.cli.data import SOURCES, Source, echo_flaws
from sparsemm.cli.options import DividedModel, FreshOption, Model, PixelsOption, QuietOption
from sparsemm.cli.outputs import claim
from sparsemm.errors import ConfigError

PAGE_SEED = 1  # the pages of `evaluate` have seed 0: heads are not chosen on the pages they are judged by


def chase(
    *,
    model: DividedModel,
    dataset: Annotated[
        str | None, typer.Option(help=f"{SOURCES} [default: documents; for miniatures, miniature].")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", "--pages", min=1, help="At most so many [default: 1000, miniatures 200]."),
    ] = None,
    match: Annotated[
        Literal["unique", "aligned"] | None,
        typer.Option(
            help="unique is the paper's rule, which matches a sixth of a dense page's tokens; aligned finds nearly all "
            "that were read [default: unique, miniatures aligned]."
        ),
    ] = None,
    source: Source,
    num_words: Annotated[
        str | None, typer.Option(help="Words of a miniature's page, taking turns [default: 1,2,3,4].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Generators: another seed draws other pages.")] = PAGE_SEED,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest reading; dense pages take 1,300 to 3,000.")
    ] = 1024,
    least_read: Annotated[
        float, typer.Option(min=0, max=1, help="Share of what is read that must stand on the pages.")
    ] = 0.1,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked [default: the paper's].")] = None,
    exact_grid: Annotated[
        bool, typer.Option("--exact-grid", help="Leave the padding out of a padded grid [default: as the paper].")
    ] = False,
    max_pixels: PixelsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Score file [default: head_scores.json of a local checkpoint, or head_scores/<model>.json]."),
    ] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
) -> None:
    """Let the model read pages and score every head by how often it looks at the word being read.

    An interrupted chase goes on where it stopped. Several GPUs: accelerate launch -m sparsemm chase ...
    """
    from sparsemm.datasets import PdfPages
    from sparsemm.models import family_of
    from sparsemm.runs.processes import workers

    name = dataset or ("miniature" if model.is_miniature else "documents")
    limit = num_images or (200 if model.is_miniature else 1000)
    words = None if num_words is None else tuple(parse_integers(num_words, "--num-words"))
    suits = model.defaults
    if name == "miniature" and suits.page_size != LARGE.page_size:
        words = words or suits.num_words
        source = replace(source, page_size=source.page_size or str(suits.page_size))
    place = output or place_of(model.model)
    claim(place)
    pages = source.open(name, limit=limit, seed=seed, num_words=words)
    network, processor = model.load(device=model.device or workers().device, max_pixels=max_pixels)
    if isinstance(pages, PdfPages) and source.pdf_pixels is None:
        pages = pages.at_most(family_of(network).largest_picture(network.config, processor) or pages.max_pixels)
    run_chase(
        model, network, processor, pages, place, match=match,
        model_name=model.name if model.is_miniature or Path(model.model).is_dir() else model.model,
        dataset=source.describe(name, words=words), seed=seed, max_new_tokens=max_new_tokens,
        least_read=least_read, prompt=prompt, exact_grid=exact_grid, resume=not fresh, progress=not no_progress,
    )  # fmt: skip


def place_of(model: str, *, calibrated: bool = False) -> Path:
    """Where the scores of a model are found again. Raises `ConfigError` where that is no folder of the user's."""
    place = score_files(model, calibrated=calibrated)[0]
    if not place.parent.is_dir():
        raise ConfigError(f"{place.parent} does not exist (this is no checkout); name a score file with --output")
    return place


def default_match(model: Model) -> str:
    """`aligned` for miniatures, whose one-character tokens occur in many words; otherwise `unique`, as in the paper."""
    return "aligned" if model.is_miniature else "unique"


def run_chase(
    model: Model, network: Any, processor: Any, pages: Any, output: Path, *, match: str | None = None,
    prompt: str | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Chase, save the scores, and print how sparse they are; `settings` of `sparsemm.chase.chase`."""
    from sparsemm.chase import READ_PROMPT
    from sparsemm.chase import chase as chase_heads
    from sparsemm.runs.processes import workers

    scores = chase_heads(
        network, processor, pages, output=output, match=match or default_match(model), prompt=prompt or READ_PROMPT,
        **settings,
    )  # fmt: skip
    if workers().first:
        figures = scores.provenance
        typer.echo(f"{output}: {scores.num_layers} layers x {scores.num_query_heads} query heads")
        if "num_images" in figures:
            typer.echo(
                f"{figures['num_images']} images read, {figures['num_skipped']} skipped; {figures['num_tokens']} "
                f"tokens, {figures['num_matched']} matched, {figures['num_hits']} hits"
            )
            if figures.get("num_cut"):
                typer.echo(f"{figures['num_cut']} readings ended at the last of their tokens (--max-new-tokens)")
            echo_flaws(figures.get("num_flaws", {}))
        typer.echo(f"top 5 % of the heads hold {100 * scores.top_share(0.05):.1f} % of the score")

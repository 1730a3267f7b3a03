"""`sparsemm data`: convert data sets of images with text boxes, and make some."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Images with text boxes, to chase heads on.")


class Format(str, Enum):
    """How text boxes are written down."""

    synthdog = "synthdog"
    plain = "plain"
    mlt = "mlt"
    ctw = "ctw"
    coco = "coco"


class Unit(str, Enum):
    """What one text box holds."""

    line = "line"
    word = "word"
    character = "character"


SourceHelp = "documents or miniature (generators), a hub id, a folder, or an annotation file."
FormatOption = Annotated[Format | None, typer.Option("--format", help="Format of the data set [default: recognised].")]
ImagesOption = Annotated[Path | None, typer.Option("--images", help="Folder of the images, if not beside the boxes.")]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a Hugging Face data set.")]
UnitOption = Annotated[
    Unit | None, typer.Option("--unit", help="Text boxes: line or word (documents), line or character (ctw).")
]
PageSizeOption = Annotated[
    str | None, typer.Option("--page-size", help="Generators: side, or WIDTHxHEIGHT, in pixels.")
]
FontsOption = Annotated[
    str | None, typer.Option("--fonts", help="Generators: train or heldout, which have no typeface in common.")
]


@app.callback()
def options() -> None:
    """Images with text boxes, to chase visual heads on."""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=SourceHelp)],
    output: Annotated[Path, typer.Argument(help="New folder for images and boxes.")],
    to: Annotated[Format, typer.Option(help="Format to write; synthdog is parquet.")] = Format.plain,
    format: FormatOption = None,
    images: ImagesOption = None,
    split: SplitOption = "train",
    num_images: Annotated[
        int | None, typer.Option(min=1, help="At most so many [default: all; generators 1000].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a generator.")] = 0,
    page_size: PageSizeOption = None,
    unit: UnitOption = None,
    fonts: FontsOption = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> None:
    """Write a data set, or pages of a generator, in another format."""
    from sparsemm.datasets import convert as write

    pages = open_source(
        source, format=format, images=images, split=split, limit=num_images, seed=seed, page_size=page_size, unit=unit,
        fonts=fonts,
    )  # fmt: skip
    written, skipped = write(pages, output, to.value, progress=not no_progress)
    typer.echo(f"{output}: {written} pages" + (f", {skipped} left out" if skipped else ""))


def open_source(
    source: str,
    *,
    format: Format | None,
    images: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    page_size: str | None,
    unit: Unit | None,
    fonts: str | None = None,
    num_words: tuple[int, ...] | None = None,
) -> Any:
    """`open_pages` with the options of the command line; those not given are not passed on."""
    from sparsemm.datasets import open_pages

    options = {"size": parse_size(page_size), "unit": None if unit is None else unit.value, "num_words": num_words}
    return open_pages(
        source,
        format=None if format is None else format.value,
        images=images,
        split=split,
        limit=limit,
        seed=seed,
        **{name: value for name, value in {**options, "fonts": fonts}.items() if value is not None},
    )


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """224 or 960x1280. Raises `ConfigError` for anything else."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        values = ()
    if len(values) not in (1, 2) or min(values) < 1:
        raise ConfigError(f"--page-size {text!r} is neither a side nor WIDTHxHEIGHT in pixels")
    return values[0] if len(values) == 1 else (values[0], values[1])

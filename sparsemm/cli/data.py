"""`sparsemm data`: convert data sets of images with text boxes, and make some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsemm.cli.options import QuietOption
from sparsemm.cli.outputs import claim, claim_folder
from sparsemm.cli.program import Program
from sparsemm.errors import ConfigError, DataError

app = Program(help="Images with text boxes, to chase visual heads on.")
Format = Literal["synthdog", "plain", "mlt", "ctw", "coco", "pdf"]
SOURCES = "documents or miniature (generators), a hub id, an annotation file, a PDF file, or a folder of these"


@dataclass(frozen=True)
class Source:
    """How a data set, or a generator of pages, is read."""

    format: Annotated[Format | None, typer.Option(help="Format of the data set [default: recognised].")] = None
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not beside the boxes.")] = None
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train"
    unit: Annotated[
        Literal["line", "word", "character"] | None,
        typer.Option(
            help="Text boxes: line or word (documents), line or character (ctw), any (pdf) [default: line, pdf word]."
        ),
    ] = None
    page_range: Annotated[
        str | None, typer.Option(help="PDF: pages of each file, such as 1-3,8,20- [default: all].")
    ] = None
    pdf_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="PDF: area of the largest picture [default: what the model takes, else 2000000]."),
    ] = None
    crops: Annotated[
        Literal["none", "halves", "quarters"] | None,
        typer.Option(help="PDF: parts of a page as images of their own, whose letters are larger."),
    ] = None
    fewest_words: Annotated[
        int | None, typer.Option(min=1, help="PDF: pages with fewer text boxes are left out [default: 1].")
    ] = None
    page_size: Annotated[str | None, typer.Option(help="Generators: side, or WIDTHxHEIGHT, in pixels.")] = None
    fonts: Annotated[
        str | None, typer.Option(help="Generators: train or heldout, which have no typeface in common.")
    ] = None

    def open(self, name: str, *, limit: int | None, seed: int, **options: Any) -> Any:
        """The pages of a data set, as `open_pages` gives them; settings that are None are not passed on."""
        from sparsemm.datasets import open_pages

        if self.images is not None and not self.images.is_dir():
            raise DataError(f"--images {self.images} is no folder; check the path")
        given = {"size": parse_size(self.page_size), "unit": self.unit, "fonts": self.fonts, **self._pdf, **options}
        return open_pages(
            name, format=self.format, images=self.images, split=self.split, limit=limit, seed=seed,
            **{option: value for option, value in given.items() if value is not None},
        )  # fmt: skip

    @property
    def _pdf(self) -> dict[str, Any]:
        """Options of `PdfPages` alone."""
        return {
            "page_range": self.page_range,
            "max_pixels": self.pdf_pixels,
            "crops": self.crops,
            "fewest_words": self.fewest_words,
        }

    def describe(self, name: str, **options: Any) -> str:
        """The data set as a score file names it: without folders, which mean nothing elsewhere."""
        values = {"split": None if self.split == "train" else self.split, "pixels": self.page_size, **options}
        values |= {"unit": self.unit, "fonts": self.fonts, **self._pdf}
        parts = [Path(name).name if Path(name).exists() else name]
        return ", ".join(parts + [f"{option} {value}" for option, value in values.items() if value is not None])


@app.command()
def convert(
    *,
    source: Annotated[str, typer.Argument(help=f"{SOURCES}.")],
    output: Annotated[Path, typer.Argument(help="New folder for images and boxes.")],
    to: Annotated[Format, typer.Option(help="Format to write; synthdog is parquet.")] = "plain",
    num_images: Annotated[
        int | None, typer.Option(min=1, help="At most so many [default: all; generators 1000].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a generator.")] = 0,
    settings: Source,
    no_progress: QuietOption = False,
) -> None:
    """Write a data set, or pages of a generator, in another format."""
    from sparsemm.datasets import convert as write

    claim_folder(output)
    pages = settings.open(source, limit=num_images, seed=seed)
    written, skipped, flaws = write(pages, output, to, progress=not no_progress)
    typer.echo(f"{output}: {written} pages" + (f", {skipped} left out" if skipped else ""))
    echo_flaws(flaws)


@app.command()
def show(
    *,
    source: Annotated[str, typer.Argument(help=f"{SOURCES}.")],
    output: Annotated[Path, typer.Argument(help="Picture to write (PNG).")],
    image: Annotated[int, typer.Option(min=1, help="Which image of the data set.")] = 1,
    seed: Annotated[int, typer.Option(help="Of a generator.")] = 0,
    settings: Source,
) -> None:
    """Draw the text boxes of an image onto it, to see them before heads are chased on them."""
    import itertools

    from sparsemm.datasets import draw_boxes

    claim(output)
    pages = settings.open(source, limit=image, seed=seed)
    page = next(itertools.islice(pages, image - 1, None), None)
    if page is None:
        raise DataError(f"{source} holds fewer than {image} images")
    drawn, words, flaws = draw_boxes(page)
    drawn.save(output, "PNG")
    typer.echo(f"{output}: {len(words)} text boxes on {drawn.width} x {drawn.height} pixels")
    typer.echo(" ".join(word.text for word in words))
    echo_flaws(flaws)


def echo_flaws(flaws: Mapping[str, int]) -> None:
    """Say how many words had which flaw, if any did."""
    if flaws:
        typer.echo("words: " + ", ".join(f"{count} {flaw}" for flaw, count in sorted(flaws.items())))


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

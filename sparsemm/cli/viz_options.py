"""What the commands of `sparsemm viz` take: the picture, the page and its prompt, heads, what a method keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm.cli.common import file_name, parse_list
from sparsemm.cli.options import BudgetOption, FormatOption, MethodOption, Model, NewTokensOption, Scores, Settings
from sparsemm.cli.outputs import claim_picture
from sparsemm.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsemm import HeadScores
    from sparsemm.documents import Page, TextBox
    from sparsemm.viz.kept import KeptRows
    from sparsemm.viz.reading import Reading

OutputOption = Annotated[
    Path | None, typer.Option(help="Image file: .png, .svg or .pdf [default: a name that says what it shows].")
]
TitleOption = Annotated[str | None, typer.Option(help="Above the picture.")]
TopOption = Annotated[int | None, typer.Option(min=0, help="So many of the highest-scoring heads.")]
BottomOption = Annotated[int | None, typer.Option(min=0, help="So many of the lowest-scoring heads.")]
TokenOption = Annotated[
    int | None, typer.Option(min=0, help="The generated token shown [default: one of the longest word].")
]


@dataclass(frozen=True)
class Picture:
    """How a figure is written."""

    title: TitleOption = None
    format: FormatOption = None

    def place(self, output: Path | None, *names: object) -> Path:
        """Where it is written, by default to a file called by `names`; made sure of."""
        path = output or Path(f"{file_name(*names)}.png")
        claim_picture(path)
        return path

    def save(self, figure: Figure, path: Path) -> None:
        """Write the file, and that of a further format beside it."""
        from sparsemm.runs.plots import save_figure

        save_figure(figure, path, self.format)
        typer.echo(str(path))


@functools.cache
def _page(size: int) -> Page:
    """The held-out page that is read where no image is given."""
    from sparsemm.experiments.session import heldout_pages

    return heldout_pages(1, tasks=("read",), num_words=(4,), seed=25, size=size)[0]


@dataclass(frozen=True)
class Question:
    """A page, and what the model is asked about it."""

    image: Annotated[Path | None, typer.Option(help="Page to read [default: a held-out page of the miniatures].")] = (
        None
    )
    prompt: Annotated[str | None, typer.Option(help="What the model is asked [default: read everything].")] = None

    def inputs(self, model: Model) -> dict[str, Any]:
        """Image and prompt, as arguments."""
        from sparsemm.chase import READ_PROMPT

        if self.image is not None and not self.image.is_file():
            raise DataError(f"image {self.image} does not exist; check the path")
        image = _page(model.defaults.page_size).image if self.image is None else self.image
        return {"image": image, "prompt": READ_PROMPT if self.prompt is None else self.prompt}

    @property
    def name(self) -> str:
        """Of files that show something of this page and prompt."""
        return file_name("page" if self.image is None else self.image.stem, self.prompt)

    def words(self, model: Model) -> Sequence[TextBox]:
        """Its words, and where they stand; of an image nothing is known."""
        return _page(model.defaults.page_size).words if self.image is None else ()


@dataclass(frozen=True)
class Heads:
    """Which heads are looked at while the model reads; by default those that the picture names."""

    heads: Annotated[str, typer.Option(help="Heads by name: 2-5 is head 5 of layer 2.")] = ""
    top: TopOption = None
    bottom: BottomOption = None
    max_new_tokens: NewTokensOption = 64

    def read(
        self, model: Model, question: Question, scores: Scores, *, default: tuple[int, int]
    ) -> tuple[Reading, HeadScores | None]:
        """What the heads look at, and the scores if there are any; `default` are top and bottom where none are named.

        Only naming heads by their rank needs scores.
        """
        from sparsemm.models.layers import ragged_layers
        from sparsemm.viz.reading import choose_heads, read_with_attention

        table = scores.find(model.model)
        inputs = question.inputs(model)
        network, processor = model.load()
        text = network.config.get_text_config()
        shape = (len(ragged_layers(text)), text.num_attention_heads)
        named = self.heads or self.top is not None or self.bottom is not None
        top, bottom = (self.top or 0, self.bottom or 0) if named else default
        heads = choose_heads(table, shape, names=parse_list(self.heads), top=top, bottom=bottom)
        reading = read_with_attention(network, processor, heads=heads, max_new_tokens=self.max_new_tokens, **inputs)
        return reading, table


@dataclass(frozen=True)
class Keeping(Settings):
    """What a method keeps of a prompt."""

    method: MethodOption = "sparsemm"
    budget: BudgetOption = 32

    @property
    def name(self) -> str:
        """Of files that show what is kept."""
        return file_name(self.method, self.budget)

    def keep(self, model: Model, question: Question, scores: HeadScores | None = None) -> KeptRows:
        """The rows that every kv head keeps of the prompt."""
        from sparsemm.viz.kept import kept_rows

        config = self.config(model.model, self.method, self.budget, scores)
        inputs = question.inputs(model)
        network, processor = model.load()
        return kept_rows(network, processor, config=config, **inputs)

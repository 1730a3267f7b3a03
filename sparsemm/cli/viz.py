"""`sparsemm viz`: pictures of head scores, budgets, attention and kept positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm.cli.common import parse_integers, parse_list
from sparsemm.cli.options import BudgetOption, MethodOption, Model, NewTokensOption, Scores, Settings, load_scores
from sparsemm.cli.program import Program
from sparsemm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sparsemm import HeadScores
    from sparsemm.viz.reading import Reading

_MOST_LAYERS = 8

app = Program(help="Pictures of head scores, budgets, attention and kept positions, as files.")

OutputOption = Annotated[Path, typer.Option(help="Image file: .png, .svg or .pdf.")]
TitleOption = Annotated[str | None, typer.Option(help="Above the picture.")]


@dataclass(frozen=True)
class Question:
    """A page, and what the model is asked about it."""

    image: Annotated[Path | None, typer.Option(help="Page to read [default: a held-out page of the miniatures].")] = (
        None
    )
    prompt: Annotated[str | None, typer.Option(help="What the model is asked [default: read everything].")] = None

    def inputs(self) -> dict[str, Any]:
        """Image and prompt, as arguments."""
        from sparsemm.chase import READ_PROMPT
        from sparsemm.experiments.session import heldout_pages

        if self.image is not None and not self.image.is_file():
            raise DataError(f"image {self.image} does not exist; check the path")
        image = self.image or heldout_pages(1, tasks=("read",), num_words=(4,), seed=11)[0].image
        return {"image": image, "prompt": READ_PROMPT if self.prompt is None else self.prompt}


@dataclass(frozen=True)
class Heads:
    """Which heads are looked at while the model reads; by default those that the picture names."""

    heads: Annotated[str, typer.Option(help="Heads by name: 2-5 is head 5 of layer 2.")] = ""
    top: Annotated[int | None, typer.Option(min=0, help="Also the so many highest-scoring heads.")] = None
    bottom: Annotated[int | None, typer.Option(min=0, help="Also the so many lowest-scoring heads.")] = None
    max_new_tokens: NewTokensOption = 64

    def read(
        self, model: Model, question: Question, scores: Scores, *, default: tuple[int, int]
    ) -> tuple[Reading, HeadScores | None]:
        """What the heads look at, and the scores if there are any; `default` are top and bottom where none are named.

        Only naming heads by their rank needs scores.
        """
        from sparsemm.viz.reading import choose_heads, read_with_attention

        table = scores.find(model.model)
        inputs = question.inputs()
        network, processor = model.load()
        text = network.config.get_text_config()
        shape = (text.num_hidden_layers, text.num_attention_heads)
        named = self.heads or self.top is not None or self.bottom is not None
        top, bottom = (self.top or 0, self.bottom or 0) if named else default
        top = min(top, shape[0] * shape[1])
        heads = choose_heads(table, shape, names=parse_list(self.heads), top=top, bottom=bottom)
        reading = read_with_attention(network, processor, heads=heads, max_new_tokens=self.max_new_tokens, **inputs)
        return reading, table


@dataclass(frozen=True)
class Keeping(Settings):
    """What a method keeps of a prompt."""

    method: MethodOption = "sparsemm"
    budget: BudgetOption = 32

    def keep(self, model: Model, question: Question) -> Any:
        """The rows that every kv head keeps of the prompt."""
        from sparsemm.viz.kept import kept_rows

        config = self.config(model.model, self.method, self.budget)
        inputs = question.inputs()
        network, processor = model.load()
        return kept_rows(network, processor, config=config, **inputs)


@app.command()
def scores(
    *,
    file: Annotated[Path, typer.Argument(help="Score file.")],
    output: OutputOption = Path("head_scores.png"),
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Mark the groups of so many kv heads [default: as the file says].")
    ] = None,
    title: TitleOption = None,
) -> None:
    """Map of the head scores, layers by heads (the paper's Figure 2)."""
    from sparsemm.viz.heads import draw_score_map, kv_heads_of

    table = load_scores(file)
    name = table.provenance.get("model", file.stem)
    draw_score_map(table, output, num_kv_heads=kv_heads_of(table, kv_heads), title=title or f"Visual heads of {name}")
    typer.echo(str(output))


@app.command()
def sparsity(
    *,
    files: Annotated[list[Path], typer.Argument(help="Score files, one line each.")],
    output: OutputOption = Path("sparsity.png"),
    title: TitleOption = None,
) -> None:
    """How much of the score the top heads hold."""
    from sparsemm.viz.heads import draw_sparsity

    draw_sparsity({file.stem: load_scores(file) for file in files}, output, title=title)
    typer.echo(str(output))


@app.command()
def attention(
    *,
    model: Model,
    question: Question,
    heads: Heads,
    tokens: Annotated[str, typer.Option(help="Numbers of generated tokens, sum (over all), or each.")] = "sum",
    parts: Annotated[str, typer.Option(help="Parts of LLaVA-NeXT's image: high_res, base, or both.")] = "",
    scores: Scores,
    output: OutputOption = Path("attention.png"),
    title: TitleOption = None,
) -> None:
    """What heads look at, drawn over the page: one row a head [default: the top 4 and the bottom 2]."""
    from sparsemm.viz.overlay import draw_overlays

    reading, table = heads.read(model, question, scores, default=(4, 2))
    chosen = _tokens(tokens, len(reading.tokens))
    draw_overlays(reading, output, tokens=chosen, parts=parse_list(parts) or None, scores=table, title=title)
    typer.echo(f"read: {reading.text}\n{output}")


@app.command()
def page(
    *,
    model: Model,
    question: Question,
    heads: Heads,
    scores: Scores,
    output: Annotated[Path, typer.Option(help="HTML file.")] = Path("attention.html"),
    title: TitleOption = None,
) -> None:
    """An HTML page on which one picks token and head; a single file, for any browser [default: the top 32 heads]."""
    from sparsemm.viz.page import write_page

    reading, table = heads.read(model, question, scores, default=(32, 0))
    write_page(reading, output, scores=table, title=title or f"What heads of {model.name} look at")
    typer.echo(f"read: {reading.text}\n{output}")


@app.command()
def budgets(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    output: OutputOption = Path("budgets.png"),
    title: TitleOption = None,
) -> None:
    """How many rows each kv head keeps of a prompt, as a map and as bars."""
    from sparsemm.viz.heads import draw_budgets

    kept = keeping.keep(model, question)
    draw_budgets(kept.rows(), output, title=title or kept.describe(), prompt_length=kept.prompt_length)
    typer.echo(str(output))


@app.command()
def kept(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    layers: Annotated[
        str | None, typer.Option(help=f"Layers drawn, numbers [default: all, of deep models {_MOST_LAYERS}].")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of LLaVA-NeXT's image: high_res or base.")] = None,
    output: OutputOption = Path("kept.png"),
    title: TitleOption = None,
) -> None:
    """Which prompt positions each kv head keeps, drawn over the page."""
    from sparsemm.viz.overlay import draw_kept

    rows = keeping.keep(model, question)
    chosen = _some_layers(len(rows.positions)) if layers is None else parse_integers(layers, "--layers")
    draw_kept(rows, output, layers=chosen, part=part, title=title)
    typer.echo(str(output))


@app.command("all")
def everything(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    top: Annotated[int, typer.Option(min=1, help="Heads drawn, highest scores first.")] = 4,
    bottom: Annotated[int, typer.Option(min=0, help="Heads drawn, lowest scores.")] = 2,
    max_new_tokens: NewTokensOption = 64,
    output: Annotated[Path | None, typer.Option(help="Folder [default: results/viz/<name of the model>].")] = None,
) -> None:
    """Every kind of picture of one model and one page."""
    from sparsemm.viz.heads import draw_budgets, draw_score_map, draw_sparsity
    from sparsemm.viz.kept import kept_rows
    from sparsemm.viz.overlay import draw_kept, draw_overlays
    from sparsemm.viz.page import write_page
    from sparsemm.viz.reading import choose_heads, read_with_attention

    folder = output or Path("results") / "viz" / model.name
    table = keeping.table(model.model)
    config = keeping.config(model.model, keeping.method, keeping.budget, table)
    inputs = question.inputs()
    network, processor = model.load()
    num_kv_heads = network.config.get_text_config().num_key_value_heads
    draw_score_map(table, folder / "head_scores.png", num_kv_heads=num_kv_heads, title=f"Visual heads of {model.name}")
    draw_sparsity({model.name: table}, folder / "sparsity.png")
    shape = (table.num_layers, table.num_query_heads)
    listed = choose_heads(table, shape, top=min(32, table.values.numel()))
    reading = read_with_attention(network, processor, heads=listed, max_new_tokens=max_new_tokens, **inputs)
    write_page(reading, folder / "attention.html", scores=table, title=f"What heads of {model.name} look at")
    chosen = choose_heads(table, shape, top=top, bottom=bottom)
    reading = read_with_attention(network, processor, heads=chosen, max_new_tokens=max_new_tokens, **inputs)
    draw_overlays(reading, folder / "attention.png", tokens=[None, *range(min(4, len(reading.tokens)))], scores=table)
    if len(reading.layout.grids) > 1:
        draw_overlays(reading, folder / "attention_parts.png", parts=list(reading.layout.grids), scores=table)
    rows = kept_rows(network, processor, config=config, **inputs)
    draw_budgets(rows.rows(), folder / "budgets.png", title=rows.describe(), prompt_length=rows.prompt_length)
    draw_kept(rows, folder / "kept.png", layers=_some_layers(len(rows.positions)))
    typer.echo(f"read: {reading.text}")
    for path in sorted(folder.iterdir()):
        typer.echo(str(path))


def _some_layers(count: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    most = min(count, _MOST_LAYERS)
    return sorted({round(index * (count - 1) / max(1, most - 1)) for index in range(most)})


def _tokens(text: str, count: int) -> list[int | None]:
    """`sum`, `each`, or numbers."""
    if text == "each":
        return list(range(count))
    chosen: list[int | None] = []
    for part in parse_list(text):
        chosen += [None] if part == "sum" else parse_integers(part, "--tokens")
    if not chosen:
        raise ConfigError("--tokens names none; give numbers, sum or each")
    return chosen

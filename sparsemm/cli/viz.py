"""`sparsemm viz`: pictures of head scores, budgets, attention and kept positions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import file_name, parse_integers, parse_list
from sparsemm.cli.options import BudgetOption, FormatOption, Model, NewTokensOption, Scores, Settings, load_scores
from sparsemm.cli.outputs import claim, claim_folder
from sparsemm.cli.program import Program
from sparsemm.cli.viz_options import (
    BottomOption,
    Heads,
    Keeping,
    OutputOption,
    Picture,
    Question,
    TitleOption,
    TokenOption,
    TopOption,
)
from sparsemm.errors import ConfigError

_MOST_LAYERS = 8
_LOW_HEADS = 8  # from which the summary takes the one that looks most at the page

app = Program(help="Pictures of head scores, budgets, attention and kept positions, as files.")


@app.command()
def summary(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    token: TokenOption = None,
    max_new_tokens: NewTokensOption = 64,
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """The method in one picture: a word is read, where two heads look, all scores, and the rows that follow."""
    from sparsemm.viz.kept import kept_rows
    from sparsemm.viz.reading import choose_heads, read_with_attention
    from sparsemm.viz.summary import draw_summary

    path = picture.place(output, "summary", model.name, question.name, keeping.name)
    table, inputs = keeping.table(model.model), question.inputs(model)
    config = keeping.config(model.model, keeping.method, keeping.budget, table)
    network, processor = model.load()
    heads = choose_heads(table, tuple(table.values.shape), top=1, bottom=_LOW_HEADS)
    reading = read_with_attention(network, processor, heads=heads, max_new_tokens=max_new_tokens, **inputs)
    rows = kept_rows(network, processor, config=config, **inputs)
    figure = draw_summary(reading, table, rows, words=question.words(model), token=token, title=picture.title)
    picture.save(figure, path)


@app.command()
def scores(
    *,
    file: Annotated[Path, typer.Argument(help="Score file.")],
    output: OutputOption = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Mark the groups of so many kv heads [default: as the file says].")
    ] = None,
    picture: Picture,
) -> None:
    """Map of the head scores, layers by heads (the paper's Figure 2)."""
    from sparsemm.viz.heads import draw_score_map, kv_heads_of

    path = picture.place(output, "head_scores", file.stem)
    table = load_scores(file)
    title = picture.title or f"Visual heads of {table.provenance.get('model', file.stem)}"
    picture.save(draw_score_map(table, num_kv_heads=kv_heads_of(table, kv_heads), title=title), path)


@app.command()
def sparsity(
    *,
    files: Annotated[list[Path], typer.Argument(help="Score files, one line each.")],
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """How much of the score the top heads hold."""
    from sparsemm.viz.heads import draw_sparsity

    path = picture.place(output, "sparsity", *(file.stem for file in files))
    tables = {file.stem: load_scores(file) for file in files}
    picture.save(draw_sparsity(tables, title=picture.title), path)


@app.command()
def attention(
    *,
    model: Model,
    question: Question,
    heads: Heads,
    tokens: Annotated[str, typer.Option(help="Numbers of generated tokens, mean (of all), or each.")] = "mean",
    parts: Annotated[str, typer.Option(help="Parts of the image, such as high_res and base.")] = "",
    scores: Scores,
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """What heads look at, drawn over the page: one row a head [default: the top 4 and the bottom 2]."""
    from sparsemm.viz.sheets import draw_overlays

    path = picture.place(output, "attention", model.name, question.name, *parse_list(heads.heads))
    reading, table = heads.read(model, question, scores, default=(4, 2))
    chosen = _tokens(tokens, len(reading.tokens))
    figure = draw_overlays(reading, tokens=chosen, parts=parse_list(parts) or None, scores=table, title=picture.title)
    typer.echo(f"read: {reading.text}")
    picture.save(figure, path)


@app.command()
def page(
    *,
    model: Model,
    question: Question,
    heads: Heads,
    scores: Scores,
    output: Annotated[Path | None, typer.Option(help="HTML file [default: attention-<model>-<page>.html].")] = None,
    title: TitleOption = None,
) -> None:
    """An HTML page on which one picks token and head; a single file, for any browser [default: the top 32 heads]."""
    from sparsemm.viz.page import write_page

    path = output or Path(f"{file_name('attention', model.name, question.name)}.html")
    claim(path)
    reading, table = heads.read(model, question, scores, default=(32, 0))
    write_page(reading, path, scores=table, title=title or f"What heads of {model.name} look at")
    typer.echo(f"read: {reading.text}\n{path}")


@app.command()
def budgets(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """How many rows each kv head keeps of a prompt, as a map and as bars."""
    from sparsemm.viz.heads import draw_budgets

    path = picture.place(output, "budgets", model.name, question.name, keeping.name)
    kept = keeping.keep(model, question)
    title = picture.title or kept.describe()
    figure = draw_budgets(kept.rows(), title=title, prompt_length=kept.prompt_length)
    picture.save(figure, path)


@app.command()
def calibration(
    *,
    model: Model,
    settings: Settings,
    budget: BudgetOption = 32,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose budgets are drawn.")] = 256,
    heads: Annotated[str, typer.Option(help="Heads whose curves are drawn, 2-5 is head 5 of layer 2.")] = "",
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """Sensitivities as a map, distortion curves [default: the 8 most sensitive heads], budgets beside SparseMM's."""
    from sparsemm import head_budgets
    from sparsemm.runs.plots import LABELS
    from sparsemm.viz.calibration import draw_calibration
    from sparsemm.viz.heads import kv_heads_of
    from sparsemm.viz.reading import choose_heads

    path = picture.place(output, "calibration", model.name, budget)
    table, visual = settings.table(model.model, calibrated=True), settings.find(model.model)
    shape = tuple(table.values.shape)
    chosen = choose_heads(table, shape, names=parse_list(heads), top=0, bottom=0) if heads else ()
    num_kv_heads = kv_heads_of(table, None) or shape[1]
    rows = {}
    for method, scores in (("rate_distortion", table), ("sparsemm", visual)):
        if scores is not None:
            config = settings.config(model.model, method, budget, scores)
            rows[f"{LABELS[method]}, budget {budget} of {prompt_length}"] = head_budgets(
                config, num_layers=shape[0], num_query_heads=shape[1], num_kv_heads=num_kv_heads,
                prompt_length=prompt_length,
            )  # fmt: skip
    title = picture.title or f"Calibration of {model.name}"
    picture.save(draw_calibration(table, rows, heads=chosen, title=title), path)


@app.command()
def kept(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    layers: Annotated[
        str | None, typer.Option(help=f"Layers drawn, numbers [default: all, of deep models {_MOST_LAYERS}].")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of the image, such as high_res or base.")] = None,
    output: OutputOption = None,
    picture: Picture,
) -> None:
    """Which prompt positions each kv head keeps, drawn over the page."""
    from sparsemm.viz.sheets import draw_kept

    path = picture.place(output, "kept", model.name, question.name, keeping.name)
    table = keeping.find(model.model)
    rows = keeping.keep(model, question, table)
    chosen = _some_layers(len(rows.positions)) if layers is None else parse_integers(layers, "--layers")
    figure = draw_kept(rows, layers=chosen, part=part, scores=table, title=picture.title)
    picture.save(figure, path)


@app.command("all")
def everything(
    *,
    model: Model,
    keeping: Keeping,
    question: Question,
    top: TopOption = 4,
    bottom: BottomOption = 2,
    max_new_tokens: NewTokensOption = 64,
    output: Annotated[
        Path | None, typer.Option(help="Folder [default: results/viz/<model>/<page>-<method>-<budget>].")
    ] = None,
    format: FormatOption = None,
) -> None:
    """Every kind of picture of one model and one page."""
    from sparsemm.viz.heads import draw_budgets, draw_score_map, draw_sparsity
    from sparsemm.viz.kept import kept_rows
    from sparsemm.viz.page import write_page
    from sparsemm.viz.reading import choose_heads, read_with_attention
    from sparsemm.viz.sheets import draw_kept, draw_overlays
    from sparsemm.viz.summary import draw_summary

    folder = output or Path("results") / "viz" / model.name / file_name(question.name, keeping.name)
    claim_folder(folder)
    table, inputs = keeping.table(model.model), question.inputs(model)
    config = keeping.config(model.model, keeping.method, keeping.budget, table)
    network, processor = model.load()
    shape = tuple(table.values.shape)
    listed, drawn, two = (
        choose_heads(table, shape, top=highest, bottom=lowest)
        for highest, lowest in ((32, 0), (top, bottom), (1, _LOW_HEADS))
    )
    heads = list(dict.fromkeys([*listed, *drawn, *two]))
    reading = read_with_attention(network, processor, heads=heads, max_new_tokens=max_new_tokens, **inputs)
    sheet, parts = reading.of_heads(drawn), list(reading.layout.grids)
    rows = kept_rows(network, processor, config=config, **inputs)
    kv_heads, title = rows.rows().shape[1], f"Visual heads of {model.name}"
    figures = {
        "summary": draw_summary(reading.of_heads(two), table, rows, words=question.words(model)),
        "head_scores": draw_score_map(table, num_kv_heads=kv_heads, title=title),
        "sparsity": draw_sparsity({model.name: table}),
        "attention": draw_overlays(sheet, tokens=[None, *range(min(4, len(reading.tokens)))], scores=table),
        "budgets": draw_budgets(rows.rows(), title=rows.describe(), prompt_length=rows.prompt_length),
        "kept": draw_kept(rows, layers=_some_layers(len(rows.positions)), scores=table),
    }
    if len(parts) > 1:
        figures["attention_parts"] = draw_overlays(sheet, parts=parts, scores=table)
    typer.echo(f"read: {reading.text}")
    for name, figure in figures.items():
        Picture(format=format).save(figure, folder / f"{name}.png")
    write_page(
        reading.of_heads(listed), folder / "attention.html", scores=table, title=f"What heads of {model.name} look at"
    )
    typer.echo(str(folder / "attention.html"))


def _some_layers(count: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    most = min(count, _MOST_LAYERS)
    return sorted({round(index * (count - 1) / max(1, most - 1)) for index in range(most)})


def _tokens(text: str, count: int) -> list[int | None]:
    """`mean`, `each`, or numbers."""
    if text == "each":
        return list(range(count))
    chosen: list[int | None] = []
    for part in parse_list(text):
        chosen += [None] if part == "mean" else parse_integers(part, "--tokens")
    if not chosen:
        raise ConfigError("--tokens names none; give numbers, mean or each")
    return chosen

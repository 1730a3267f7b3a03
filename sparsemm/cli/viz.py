"""`sparsemm viz`: pictures of head scores, budgets, attention and kept positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    HeadScoresOption,
    ModelOption,
    RatioOption,
    Rounding,
    RoundingOption,
    SeedOption,
    WindowOption,
    find_head_scores,
    load,
    parse_integers,
    parse_list,
    short_name,
    window_for,
)
from sparsemm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sparsemm import CompressionConfig, HeadScores
    from sparsemm.viz.reading import Reading

_MOST_LAYERS = 8

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pictures, as files.")

OutputOption = Annotated[Path, typer.Option(help="Image file: .png, .svg or .pdf.")]
TitleOption = Annotated[str | None, typer.Option(help="Above the picture.")]
ImageOption = Annotated[Path | None, typer.Option(help="Page to read [default: a held-out page of the miniatures].")]
PromptOption = Annotated[str | None, typer.Option(help="What the model is asked [default: read everything].")]
HeadsOption = Annotated[str, typer.Option(help="Heads by name: 2-5 is head 5 of layer 2.")]
TopOption = Annotated[int | None, typer.Option(min=0, help="Also the so many highest-scoring heads.")]
BottomOption = Annotated[int | None, typer.Option(min=0, help="Also the so many lowest-scoring heads.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest reading.")]
MethodOption = Annotated[str, typer.Option(help="snapkv, pyramidkv, adakv, sparsemm, random.")]
BudgetOption = Annotated[int, typer.Option(min=1, help="Mean prompt rows kept per kv head, window included.")]
KvHeadsOption = Annotated[
    int | None, typer.Option(min=1, help="Mark the groups of so many kv heads [default: as the file says].")
]
FileArgument = Annotated[Path, typer.Argument(help="Score file.")]


@app.callback()
def options() -> None:
    """Pictures of head scores, budgets, attention and kept positions, as files."""


@app.command()
def scores(
    file: FileArgument, output: OutputOption = Path("head_scores.png"), kv_heads: KvHeadsOption = None,
    title: TitleOption = None,
) -> None:  # fmt: skip
    """Map of the head scores, layers by heads (the paper's Figure 2)."""
    from sparsemm import HeadScores
    from sparsemm.viz.heads import draw_score_map, kv_heads_of

    table = HeadScores.load(file)
    name = table.provenance.get("model", file.stem)
    draw_score_map(table, output, num_kv_heads=kv_heads_of(table, kv_heads), title=title or f"Visual heads of {name}")
    typer.echo(str(output))


@app.command()
def sparsity(
    files: Annotated[list[Path], typer.Argument(help="Score files, one line each.")],
    output: OutputOption = Path("sparsity.png"),
    title: TitleOption = None,
) -> None:
    """How much of the score the top heads hold."""
    from sparsemm import HeadScores
    from sparsemm.viz.heads import draw_sparsity

    draw_sparsity({file.stem: HeadScores.load(file) for file in files}, output, title=title)
    typer.echo(str(output))


@app.command()
def attention(
    model: ModelOption = DEFAULT_MODEL,
    image: ImageOption = None,
    prompt: PromptOption = None,
    heads: HeadsOption = "",
    top: TopOption = None,
    bottom: BottomOption = None,
    tokens: Annotated[str, typer.Option(help="Numbers of generated tokens, sum (over all), or each.")] = "sum",
    parts: Annotated[str, typer.Option(help="Parts of LLaVA-NeXT's image: high_res, base, or both.")] = "",
    max_new_tokens: TokensOption = 64,
    head_scores: HeadScoresOption = None,
    output: OutputOption = Path("attention.png"),
    title: TitleOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """What heads look at, drawn over the page: one row a head [default: the top 4 and the bottom 2]."""
    from sparsemm.viz.overlay import draw_overlays

    if not heads and top is None and bottom is None:
        top, bottom = 4, 2
    reading, table = _read(model, image, prompt, heads, top, bottom, max_new_tokens, head_scores, device, dtype)
    draw_overlays(
        reading, output, tokens=_tokens(tokens, len(reading.tokens)), parts=parse_list(parts) or None, scores=table,
        title=title,
    )  # fmt: skip
    typer.echo(f"read: {reading.text}\n{output}")


@app.command()
def page(
    model: ModelOption = DEFAULT_MODEL,
    image: ImageOption = None,
    prompt: PromptOption = None,
    heads: HeadsOption = "",
    top: TopOption = None,
    bottom: BottomOption = None,
    max_new_tokens: TokensOption = 64,
    head_scores: HeadScoresOption = None,
    output: Annotated[Path, typer.Option(help="HTML file.")] = Path("attention.html"),
    title: TitleOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """An HTML page on which one picks token and head; a single file, for any browser [default: the top 32 heads]."""
    from sparsemm.viz.page import write_page

    if not heads and top is None and bottom is None:
        top = 32
    reading, table = _read(model, image, prompt, heads, top, bottom, max_new_tokens, head_scores, device, dtype)
    write_page(reading, output, scores=table, title=title or f"What heads of {short_name(model)} look at")
    typer.echo(f"read: {reading.text}\n{output}")


@app.command()
def budgets(
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "sparsemm",
    budget: BudgetOption = 32,
    image: ImageOption = None,
    prompt: PromptOption = None,
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = Rounding.exact,
    seed: SeedOption = 0,
    output: OutputOption = Path("budgets.png"),
    title: TitleOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """How many rows each kv head keeps of a prompt, as a map and as bars."""
    from sparsemm.viz.heads import draw_budgets

    kept = _keep(model, method, budget, image, prompt, head_scores, window_size, ratio, rounding, seed, device, dtype)
    draw_budgets(kept.rows(), output, title=title or kept.describe(), prompt_length=kept.prompt_length)
    typer.echo(str(output))


@app.command()
def kept(
    model: ModelOption = DEFAULT_MODEL,
    method: MethodOption = "sparsemm",
    budget: BudgetOption = 32,
    image: ImageOption = None,
    prompt: PromptOption = None,
    layers: Annotated[
        str | None, typer.Option(help=f"Layers drawn, numbers [default: all, of deep models {_MOST_LAYERS}].")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of LLaVA-NeXT's image: high_res or base.")] = None,
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = Rounding.exact,
    seed: SeedOption = 0,
    output: OutputOption = Path("kept.png"),
    title: TitleOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Which prompt positions each kv head keeps, drawn over the page."""
    from sparsemm.viz.overlay import draw_kept

    rows = _keep(model, method, budget, image, prompt, head_scores, window_size, ratio, rounding, seed, device, dtype)
    chosen = _some_layers(len(rows.positions)) if layers is None else parse_integers(layers, "--layers")
    draw_kept(rows, output, layers=chosen, part=part, title=title)
    typer.echo(str(output))


@app.command("all")
def everything(
    model: ModelOption = DEFAULT_MODEL,
    image: ImageOption = None,
    prompt: PromptOption = None,
    method: MethodOption = "sparsemm",
    budget: BudgetOption = 32,
    top: Annotated[int, typer.Option(min=1, help="Heads drawn, highest scores first.")] = 4,
    bottom: Annotated[int, typer.Option(min=0, help="Heads drawn, lowest scores.")] = 2,
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    max_new_tokens: TokensOption = 64,
    output: Annotated[Path | None, typer.Option(help="Folder [default: results/viz/<name of the model>].")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Every kind of picture of one model and one page."""
    from sparsemm.viz.heads import draw_budgets, draw_score_map, draw_sparsity
    from sparsemm.viz.kept import kept_rows
    from sparsemm.viz.overlay import draw_kept, draw_overlays
    from sparsemm.viz.page import write_page
    from sparsemm.viz.reading import choose_heads, read_with_attention

    folder = output or Path("results") / "viz" / short_name(model)
    table = _scores(model, head_scores)
    config = _config(model, method, budget, head_scores, window_size, ratio, Rounding.exact, 0)
    network, processor = load(model, device=device, dtype=dtype)
    num_kv_heads = network.config.get_text_config().num_key_value_heads
    name, picture, question = short_name(model), _picture(image), _question(prompt)
    draw_score_map(table, folder / "head_scores.png", num_kv_heads=num_kv_heads, title=f"Visual heads of {name}")
    draw_sparsity({name: table}, folder / "sparsity.png")
    shape = (table.num_layers, table.num_query_heads)
    listed = choose_heads(table, shape, top=min(32, table.values.numel()))
    reading = read_with_attention(network, processor, picture, listed, prompt=question, max_new_tokens=max_new_tokens)
    write_page(reading, folder / "attention.html", scores=table, title=f"What heads of {name} look at")
    chosen = choose_heads(table, shape, top=top, bottom=bottom)
    reading = read_with_attention(network, processor, picture, chosen, prompt=question, max_new_tokens=max_new_tokens)
    draw_overlays(reading, folder / "attention.png", tokens=[None, *range(min(4, len(reading.tokens)))], scores=table)
    if len(reading.layout.grids) > 1:
        draw_overlays(reading, folder / "attention_parts.png", parts=list(reading.layout.grids), scores=table)
    rows = kept_rows(network, processor, picture, config, prompt=question)
    draw_budgets(rows.rows(), folder / "budgets.png", title=rows.describe(), prompt_length=rows.prompt_length)
    draw_kept(rows, folder / "kept.png", layers=_some_layers(len(rows.positions)))
    typer.echo(f"read: {reading.text}")
    for path in sorted(folder.iterdir()):
        typer.echo(str(path))


def _some_layers(count: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    most = min(count, _MOST_LAYERS)
    return sorted({round(index * (count - 1) / max(1, most - 1)) for index in range(most)})


def _read(
    model: str, image: Path | None, prompt: str | None, heads: str, top: int | None, bottom: int | None, tokens: int,
    head_scores: Path | None, device: str | None, dtype: str | None,
) -> tuple[Reading, HeadScores | None]:  # fmt: skip
    from sparsemm.viz.reading import choose_heads, read_with_attention

    file = find_head_scores(model, head_scores)
    table = None if file is None else _scores(model, file)
    picture = _picture(image)
    network, processor = load(model, device=device, dtype=dtype)
    text = network.config.get_text_config()
    shape = (text.num_hidden_layers, text.num_attention_heads)
    most = min(top or 0, shape[0] * shape[1])
    chosen = choose_heads(table, shape, names=parse_list(heads), top=most, bottom=bottom or 0)
    reading = read_with_attention(network, processor, picture, chosen, prompt=_question(prompt), max_new_tokens=tokens)
    return reading, table


def _keep(
    model: str, method: str, budget: int, image: Path | None, prompt: str | None, head_scores: Path | None,
    window_size: int | None, ratio: float, rounding: Rounding, seed: int, device: str | None, dtype: str | None,
) -> Any:  # fmt: skip
    from sparsemm.viz.kept import kept_rows

    config = _config(model, method, budget, head_scores, window_size, ratio, rounding, seed)
    picture = _picture(image)
    network, processor = load(model, device=device, dtype=dtype)
    return kept_rows(network, processor, picture, config, prompt=_question(prompt))


def _config(
    model: str, method: str, budget: int, head_scores: Path | None, window_size: int | None, ratio: float,
    rounding: Rounding, seed: int,
) -> CompressionConfig:  # fmt: skip
    import sparsemm
    from sparsemm.methods import get_method

    return sparsemm.CompressionConfig(
        method=method,
        budget=budget,
        head_scores=_scores(model, head_scores) if get_method(method).head_scores == "given" else None,
        window_size=window_for(model, window_size),
        ratio=ratio,
        rounding=rounding.value,
        seed=seed,
    )


def _scores(model: str, given: Path | None) -> HeadScores:
    from sparsemm import HeadScores

    file = find_head_scores(model, given)
    if file is None:
        raise DataError(f"there are no head scores of {short_name(model)}; chase them, or give --head-scores")
    return HeadScores.load(file)


def _picture(image: Path | None) -> Any:
    if image is not None:
        if not image.is_file():
            raise DataError(f"image {image} does not exist; check the path")
        return image
    from sparsemm.experiments.session import heldout_pages

    return heldout_pages(1, tasks=("read",), num_words=(4,), seed=11)[0].image


def _question(prompt: str | None) -> str:
    from sparsemm.chase import READ_PROMPT

    return READ_PROMPT if prompt is None else prompt


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

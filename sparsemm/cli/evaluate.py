"""`sparsemm evaluate`, `report` and `quickstart`: every method at every budget, as a table and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsemm.cli.chase import PAGE_SEED, run_chase
from sparsemm.cli.common import LARGE, SMALL, WIDE, file_name, listed, parse_integers, parse_list
from sparsemm.cli.options import (
    DividedModel,
    MethodsOption,
    Metric,
    Model,
    Reading,
    Settings,
    load_scores,
    usable_methods,
)
from sparsemm.cli.outputs import claim, claim_picture
from sparsemm.errors import DataError

if TYPE_CHECKING:
    from sparsemm import HeadScores

ALL_METHODS = (
    "fullkv,streaming_llm,knorm,keydiff,snapkv,pyramidkv,adakv,expected_attention,vl_cache,mixkv,head_kv,sparsemm,"
    "rate_distortion,rate_distortion_mixkv,random,mask,mask_random"
)
QUICK_METHODS = "fullkv,snapkv,pyramidkv,adakv,sparsemm,rate_distortion_mixkv,random,mask,mask_random"


@dataclass(frozen=True)
class Grid:
    """Which methods run, at which budgets."""

    methods: MethodsOption = ALL_METHODS
    budgets: Annotated[
        str | None,
        typer.Option(
            help=f"Mean prompt rows kept per kv head [default: {listed(LARGE.budgets)}, miniatures "
            f"{listed(SMALL.budgets)}, or {listed(WIDE.budgets)}]."
        ),
    ] = None


@dataclass(frozen=True)
class QuickGrid(Grid):
    """Those of the paper, and the one that beats them; the others on request."""

    methods: MethodsOption = QUICK_METHODS


def evaluate(
    *,
    model: DividedModel,
    grid: Grid,
    settings: Settings,
    reading: Reading,
    output: Annotated[
        Path | None, typer.Option(help="Folder of results.json and accuracy.png [default: results/<model>].")
    ] = None,
) -> None:
    """Read held-out pages with every method at every budget. An interrupted run goes on where it stopped."""
    folder = output or Path("results") / model.name
    claim(folder / "results.json", folder / "accuracy.png")
    _evaluate(model, grid, settings, settings.find(model.model), reading, folder)


def _evaluate(
    model: Model,
    grid: Grid,
    settings: Settings,
    scores: HeadScores | None,
    reading: Reading,
    folder: Path,
    loaded: tuple[Any, Any] | None = None,
) -> None:
    """Evaluate into `folder`, then print the table and draw the plot. Everything is checked before the model is loaded.

    Methods that need scores are left out where there are none; the program then ends with status 1.
    """
    import sparsemm.experiments.evaluate as engine
    from sparsemm.experiments.session import PageReader
    from sparsemm.methods import get_method
    from sparsemm.runs.processes import workers

    methods = list(dict.fromkeys(parse_list(ALL_METHODS if grid.methods == "all" else grid.methods)))
    calibration = None
    if any(get_method(name).needs_calibration for name in methods):
        calibration = settings.find(model.model, calibrated=True)
    usable = usable_methods(methods, scores, calibration)
    if methods and not usable:
        scores = settings.table(model.model)  # says where there is none, and what to do
    options = {
        "methods": usable,
        "budgets": parse_integers(grid.budgets, "--budgets") if grid.budgets else list(model.defaults.budgets),
        "head_scores": scores,
        "calibration": calibration,
    }
    engine.make_grid(**options, options=settings.fields(model.model))
    pages = reading.pages(model)
    reader = PageReader(
        *(loaded or model.load()), pages, output=folder / "results.json", model_name=model.name, **reading.how
    )
    engine.evaluate(reader, **options, **settings.fields(model.model))
    if workers().first:
        report(results=folder / "results.json")
    if len(usable) < len(methods):
        raise typer.Exit(1)


def report(
    *,
    results: Annotated[Path, typer.Argument(help="results.json of an evaluation.")],
    plot: Annotated[
        Path | None, typer.Option(help="Image file [default: <metric>[-<task>].png beside the results].")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="What to plot, and to list by task.")] = "accuracy",
    task: Annotated[
        str | None, typer.Option(help="One task only: read, field, or a part such as 'read/3 words'.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            help="A method to compare, page by page, with the best other one in every cell; also prints every task "
            "by method and budget, with standard errors."
        ),
    ] = None,
) -> None:
    """Print the table of an evaluation and draw its plot."""
    from sparsemm.experiments.evaluate import Results
    from sparsemm.experiments.paired import format_pairs, pair_with_best
    from sparsemm.experiments.report import describe, format_by_budget, format_table, plot_accuracy

    found = Results.load(results)
    picture = plot or results.with_name(f"{file_name(metric, task)}.png")
    claim_picture(picture)
    typer.echo(format_table(found.cells, metric=metric, task=task))
    if pair is not None:
        pairs = pair_with_best(found.cells, pair, metric=metric)
        typer.echo(f"\n{format_by_budget(found.cells, metric)}\n\n{format_pairs(pairs, pair)}")
    typer.echo(f"\n{describe(found)}")
    typer.echo(f"results: {results}")
    if any(cell.nominal_budget is not None for cell in found.cells):
        title = f"Reading held-out pages, {found.settings['model']}"
        plot_accuracy(found.cells, picture, metric=metric, task=task, title=title)
        typer.echo(f"plot:    {picture}")
    elif plot is not None:
        raise DataError(f"{results} has no method with a budget, so there is nothing to plot")


def quickstart(
    *,
    model: Model,
    grid: QuickGrid,
    settings: Settings,
    reading: Reading,
    chase: Annotated[
        bool, typer.Option("--chase", help="Chase the visual heads first, instead of loading them.")
    ] = False,
    chase_pages: Annotated[int, typer.Option(min=1, help="Pages for --chase.")] = 100,
    output: Annotated[Path, typer.Option(help="Folder of everything written.")] = Path("results/quickstart"),
) -> None:
    """The whole method on a miniature: visual heads, methods at every budget, a table and a plot."""
    from sparsemm.datasets import open_pages
    from sparsemm.experiments.session import heldout_pages

    loaded, scores, picture = None, None, output / "page.png"
    claim(output / "results.json", output / "accuracy.png", picture)
    if chase:
        loaded, file = model.load(), output / f"head_scores-{model.name}.json"
        pages = open_pages("miniature", limit=chase_pages, seed=PAGE_SEED)
        run_chase(
            model, *loaded, pages, file, model_name=model.name, dataset="miniature", seed=PAGE_SEED,
            resume=not reading.fresh, progress=not reading.no_progress,
        )  # fmt: skip
        scores = load_scores(file)
    _evaluate(model, grid, settings, scores or settings.table(model.model), reading, output, loaded)
    heldout_pages(1, tasks=("read",), num_words=(4,), seed=1)[0].image.save(picture)
    typer.echo(
        f"\nNow on a picture of your own, or this one:\n  sparsemm generate --model {model.model} --image {picture} "
        "--method sparsemm --budget 64"
    )

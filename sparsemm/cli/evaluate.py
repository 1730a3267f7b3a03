"""`sparsemm evaluate`, `report` and `quickstart`: every method at every budget, as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    FreshOption,
    HeadScoresOption,
    MaskMode,
    MaskModeOption,
    MaskRatioOption,
    ModelOption,
    PageSeedOption,
    QuietOption,
    RatioOption,
    Rounding,
    RoundingOption,
    SeedOption,
    TasksOption,
    TokensOption,
    WindowOption,
    WordsOption,
    find_head_scores,
    is_miniature,
    load,
    pages_for,
    parse_integers,
    parse_list,
    short_name,
    window_for,
)
from sparsemm.errors import DataError

ALL_METHODS = "fullkv,snapkv,pyramidkv,adakv,sparsemm,random,mask,mask_random"
MINIATURE_BUDGETS = "8,12,16,24,32,64,128"
BUDGETS = "64,128,256,512,1024,2048"  # Table 3 of the paper

MethodsOption = Annotated[str, typer.Option(help="Names separated by commas or spaces, or all.")]
BudgetsOption = Annotated[
    str | None,
    typer.Option(help=f"Mean prompt rows kept per kv head [default: {BUDGETS}, miniatures {MINIATURE_BUDGETS}]."),
]


def evaluate(
    model: ModelOption = DEFAULT_MODEL,
    methods: MethodsOption = ALL_METHODS,
    budgets: BudgetsOption = None,
    documents: DocumentsOption = 64,
    tasks: TasksOption = "read,field",
    num_words: WordsOption = "1,2,3,4",
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = Rounding.exact,
    mask_ratio: MaskRatioOption = 0.1,
    mask_mode: MaskModeOption = MaskMode.zero_query,
    seed: SeedOption = 0,
    page_seed: PageSeedOption = 0,
    batch_size: BatchOption = 16,
    max_new_tokens: TokensOption = 48,
    output: Annotated[Path | None, typer.Option(help="Folder of results.json and accuracy.png.")] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read held-out pages with every method at every budget. An interrupted run goes on where it stopped."""
    folder = output or Path("results") / short_name(model)
    network, processor = load(model, device=device, dtype=dtype)
    run_evaluation(
        network,
        processor,
        folder,
        model_name=short_name(model),
        methods=methods,
        budgets=budgets_for(model, budgets),
        documents=documents,
        tasks=tasks,
        num_words=num_words,
        page_seed=page_seed,
        head_scores=find_head_scores(model, head_scores),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        fresh=fresh,
        progress=not no_progress,
        window_size=window_for(model, window_size),
        ratio=ratio,
        rounding=rounding.value,
        mask_ratio=mask_ratio,
        mask_mode=mask_mode.value,
        seed=seed,
    )


def budgets_for(model: str, given: str | None) -> list[int]:
    """The budgets given, else those that suit the model's prompts."""
    default = MINIATURE_BUDGETS if is_miniature(model) else BUDGETS
    return parse_integers(default if given is None else given, "--budgets")


def run_evaluation(
    network: Any,
    processor: Any,
    folder: Path,
    *,
    methods: str,
    budgets: list[int],
    documents: int,
    tasks: str,
    num_words: str,
    page_seed: int,
    **settings: Any,
) -> None:
    """Evaluate into `folder`, then print the table and draw the plot."""
    import sparsemm.experiments.evaluate as engine

    pages = pages_for(documents, tasks, num_words, page_seed)
    engine.evaluate(
        network,
        processor,
        pages,
        methods=parse_list(ALL_METHODS if methods == "all" else methods),
        budgets=budgets,
        output=folder / "results.json",
        **settings,
    )
    report(folder / "results.json")


def report(
    results: Annotated[Path, typer.Argument(help="results.json of an evaluation.")],
    plot: Annotated[Path | None, typer.Option(help="Image file [default: accuracy.png beside the results].")] = None,
    metric: Annotated[str, typer.Option(help="What to plot: accuracy, exact_match, anls.")] = "accuracy",
    task: Annotated[str | None, typer.Option(help="Plot one task only: read, field, 'read/3 words', …")] = None,
) -> None:
    """Print the table of an evaluation and draw its plot."""
    from sparsemm.experiments.report import describe, format_table, plot_accuracy
    from sparsemm.runs.results import Results

    found = Results.load(results)
    typer.echo(format_table(found.cells))
    typer.echo(f"\n{describe(found)}")
    typer.echo(f"results: {results}")
    picture = plot or results.with_name("accuracy.png")
    if any(cell.nominal_budget is not None for cell in found.cells):
        title = f"Reading held-out pages, {found.settings['model']}"
        plot_accuracy(found.cells, picture, metric=metric, task=task, title=title)
        typer.echo(f"plot:    {picture}")
    elif plot is not None:
        raise DataError(f"{results} has no method with a budget, so there is nothing to plot")


def quickstart(
    model: ModelOption = DEFAULT_MODEL,
    methods: MethodsOption = ALL_METHODS,
    budgets: BudgetsOption = None,
    documents: DocumentsOption = 64,
    head_scores: HeadScoresOption = None,
    chase: Annotated[
        bool, typer.Option("--chase", help="Chase the visual heads first, instead of loading them.")
    ] = False,
    chase_pages: Annotated[int, typer.Option(min=1, help="Pages for --chase.")] = 100,
    ratio: RatioOption = 0.1,
    mask_ratio: MaskRatioOption = 0.1,
    output: Annotated[Path, typer.Option(help="Folder of everything written.")] = Path("results/quickstart"),
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """The whole method on a miniature: visual heads, every method at every budget, a table and a plot."""
    from sparsemm.experiments.session import heldout_pages

    network, processor = load(model, device=device, dtype=dtype)
    scores = find_head_scores(model, head_scores)
    if chase:
        from sparsemm.cli.chase import default_match, run_chase

        scores = output / f"head_scores-{short_name(model)}.json"
        run_chase(
            network,
            processor,
            scores,
            model_name=short_name(model),
            pages=chase_pages,
            match=default_match(model),
            resume=not fresh,
            progress=not no_progress,
        )
    if scores is None:
        raise DataError(
            f"there are no head scores of {short_name(model)}; chase them with --chase, or give --head-scores"
        )
    run_evaluation(
        network,
        processor,
        output,
        model_name=short_name(model),
        methods=methods,
        budgets=budgets_for(model, budgets),
        documents=documents,
        tasks="read,field",
        num_words="1,2,3,4",
        page_seed=0,
        head_scores=scores,
        fresh=fresh,
        progress=not no_progress,
        window_size=window_for(model, None),
        ratio=ratio,
        mask_ratio=mask_ratio,
    )
    picture = output / "page.png"
    heldout_pages(1, tasks=("read",), num_words=(4,), seed=1)[0].image.save(picture)
    typer.echo(
        f"\nNow on a picture of your own, or this one:\n  sparsemm generate --model {model} --image {picture} "
        "--method sparsemm --budget 64"
    )

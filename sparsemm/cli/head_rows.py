"""`sparsemm head-rows`: what the rows of single kv heads are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    FreshOption,
    HeadScoresOption,
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
    load,
    pages_for,
    parse_list,
    short_name,
    window_for,
)


def head_rows(
    model: ModelOption = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="The method whose heads are changed, any.")] = "fullkv",
    budget: Annotated[int | None, typer.Option(min=1, help="Its budget, if it has one.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of the changed head [default: the budget, else the window].")
    ] = None,
    heads: Annotated[str, typer.Option(help="kv heads: 2-5 is head 5 of layer 2 [default: all].")] = "",
    documents: DocumentsOption = 64,
    tasks: TasksOption = "read,field",
    num_words: WordsOption = "1,2,3,4",
    page_seed: PageSeedOption = 0,
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = Rounding.exact,
    seed: SeedOption = 0,
    top: Annotated[int, typer.Option(min=1, help="Heads listed, largest changes first.")] = 10,
    batch_size: BatchOption = 16,
    max_new_tokens: TokensOption = 48,
    output: Annotated[
        Path | None, typer.Option(help="JSON file [default: results/head_rows/<model>-<method>[-<budget>].json].")
    ] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read held-out pages, then again for each kv head with other rows for it alone. Table, JSON and map.

    With the full cache: which heads live on the prompt. Under a method with a budget: which heads it starves.
    """
    from sparsemm import CompressionConfig, HeadScores
    from sparsemm.experiments.head_rows import changes, format_head_rows, head_rows_experiment
    from sparsemm.methods import get_method
    from sparsemm.viz.heads import draw_head_rows
    from sparsemm.viz.reading import choose_heads

    found = find_head_scores(model, head_scores)
    chosen = get_method(method)
    config = CompressionConfig(
        method=method,
        budget=budget if chosen.compresses else None,
        head_scores=found if chosen.head_scores == "given" else None,
        window_size=window_for(model, window_size),
        ratio=ratio,
        rounding=rounding.value,
        seed=seed,
    )
    pages = pages_for(documents, tasks, num_words, page_seed)
    name = "-".join(map(str, filter(None, (short_name(model), method, config.budget))))
    path = output or Path("results") / "head_rows" / f"{name}.json"
    network, processor = load(model, device=device, dtype=dtype)
    text = network.config.get_text_config()
    shape = (text.num_hidden_layers, text.num_key_value_heads)
    results = head_rows_experiment(
        network,
        processor,
        pages,
        config,
        rows=rows,
        heads=choose_heads(None, shape, names=parse_list(heads)) if heads else None,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=path,
        fresh=fresh,
        model_name=short_name(model),
        progress=not no_progress,
    )
    typer.echo(format_head_rows(results, None if found is None else HeadScores.load(found), top))
    title = f"{name}: one kv head at {results.settings['rows']} rows"
    draw_head_rows({task: changes(results, task) for task in results.base.tasks}, path.with_suffix(".png"), title=title)
    typer.echo(f"\nresults: {path}\nplot:    {path.with_suffix('.png')}")

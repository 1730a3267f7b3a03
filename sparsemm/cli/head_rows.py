"""`sparsemm head-rows`: what the rows of single kv heads are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import parse_list
from sparsemm.cli.options import BudgetOption, FormatOption, MethodOption, Model, Reading, Settings
from sparsemm.cli.outputs import claim

TASKS = {"read": "Document reading", "field": "Field question"}
"""Tasks as the map names them, in its order."""


def head_rows(
    *,
    model: Model,
    method: MethodOption = "fullkv",
    budget: BudgetOption = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of the changed head [default: the budget, else the window].")
    ] = None,
    heads: Annotated[str, typer.Option(help="kv heads: 2-5 is head 5 of layer 2 [default: all].")] = "",
    settings: Settings,
    reading: Reading,
    top: Annotated[int, typer.Option(min=1, help="Heads listed, largest changes first.")] = 10,
    output: Annotated[
        Path | None, typer.Option(help="JSON file [default: results/head_rows/<model>-<method>[-<budget>].json].")
    ] = None,
    format: FormatOption = None,
) -> None:
    """Read held-out pages, then again for each kv head with other rows for it alone. Table, JSON and map.

    With the full cache: which heads live on the prompt. Under a method with a budget: which heads it starves.
    """
    from sparsemm.experiments.head_rows import changes, format_head_rows, head_rows_experiment
    from sparsemm.experiments.session import PageReader
    from sparsemm.models.layers import ragged_layers
    from sparsemm.runs.plots import LABELS, save_figure
    from sparsemm.viz.heads import draw_head_rows
    from sparsemm.viz.reading import choose_heads

    scores = settings.find(model.model)
    config = settings.config(model.model, method, budget, scores)
    pages = reading.pages(model)
    name = "-".join(map(str, filter(None, (model.name, method, config.budget))))
    path = output or Path("results") / "head_rows" / f"{name}.json"
    claim(path, path.with_suffix(".png"))
    network, processor = model.load()
    text = network.config.get_text_config()
    shape = (len(ragged_layers(text)), text.num_key_value_heads)
    chosen = choose_heads(None, shape, names=parse_list(heads)) if heads else None
    reader = PageReader(network, processor, pages, output=path, model_name=model.name, **reading.how)
    results = head_rows_experiment(reader, config, rows=rows, heads=chosen)
    typer.echo(format_head_rows(results, scores, top))
    named = LABELS.get(method, method) + (f" at budget {config.budget}" if config.budget else "")
    alone = results.settings["rows"]
    window = " (its window)" if alone == config.window_size else ""
    title = f"{model.name}, {named}: one kv head at a time keeps {alone} prompt rows{window}"
    tables = {name: changes(results, task) for task, name in TASKS.items() if task in results.base.tasks}
    save_figure(draw_head_rows(tables, title=title), path.with_suffix(".png"), format)
    typer.echo(f"\nresults: {path}\nplot:    {path.with_suffix('.png')}")

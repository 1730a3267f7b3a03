"""`sparsemm head-scores`: look at score files, convert them, compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.options import AnyScoresOption, load_scores
from sparsemm.cli.outputs import claim
from sparsemm.cli.program import Program

app = Program(help="Show, convert and compare head-score files.")
FileArgument = Annotated[Path, typer.Argument(help="A score file, of this package or of the original release.")]


@app.command()
def show(
    file: FileArgument,
    top: Annotated[int, typer.Option(min=1, help="Number of heads listed.")] = 10,
    kv_heads: Annotated[
        int | None, typer.Option(help="Also sum the scores over the groups of so many kv heads.")
    ] = None,
) -> None:
    """Where the scores come from, how sparse they are, and the heads with most of them."""
    from sparsemm import HeadScores
    from sparsemm.head_scores import heads_of_share

    scores = HeadScores.load(file)
    typer.echo(f"{file}: {scores.num_layers} layers x {scores.num_query_heads} query heads")
    for name, value in scores.provenance.items():
        typer.echo(f"  {name}: {value}")
    for percent in (1, 5, 10, 20):
        count = heads_of_share(percent / 100, scores.values.numel())
        held = 100 * scores.top_share(percent / 100)
        typer.echo(f"top {percent:>2} % of the heads ({count}) hold {held:5.1f} % of the score")
    for share in (50, 80, 90):
        count = scores.num_heads_holding(share / 100)
        typer.echo(f"{share} % of the score lies in {count} of {scores.values.numel()} heads")
    typer.echo("layer head  share of the score")
    values = scores.normalised()
    for index in values.flatten().argsort(descending=True, stable=True)[:top].tolist():
        layer, head = divmod(index, scores.num_query_heads)
        typer.echo(f"{layer:5d} {head:4d}  {100 * float(values[layer, head]):.2f} %")
    if kv_heads is not None:
        table = scores.to_kv_heads(kv_heads) / scores.values.sum()
        typer.echo("share of each kv head, one line a layer, in %")
        for layer, row in enumerate(table.tolist()):
            typer.echo(f"{layer:5d}  " + " ".join(f"{100 * value:6.2f}" for value in row))


@app.command()
def convert(
    file: FileArgument,
    output: Annotated[Path, typer.Argument(help="File to write.")],
    model: Annotated[str | None, typer.Option(help="Model id to note in it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Read a file in either format, check it, and write it in this package's format."""
    from sparsemm import HeadScores
    from sparsemm.errors import DataError

    claim(output)
    scores = HeadScores.load(file)
    if output.exists() and not force:
        raise DataError(f"{output} exists; choose another name, or overwrite it with --force")
    if model is not None:
        scores.provenance["model"] = model
    scores.save(output)
    typer.echo(f"{output}: {scores.num_layers} layers x {scores.num_query_heads} query heads")


@app.command()
def compare(
    first: FileArgument,
    second: FileArgument,
    any_head_scores: AnyScoresOption = False,
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of heads to compare as a set.")] = 0.05,
) -> None:
    """How alike two score tables of one model are: correlations, and how many top heads they share."""
    import torch

    from sparsemm.errors import HeadScoreError
    from sparsemm.head_scores import heads_of_share, rank_correlation

    tables = [load_scores(first)]
    tables.append(load_scores(second, tables[0].identity, any_model=any_head_scores))
    tables[1].check_shape(tables[0].num_layers, tables[0].num_query_heads)
    values = torch.stack([table.normalised().flatten() for table in tables])
    if bool((values.std(dim=1) == 0).any()):
        raise HeadScoreError("one of the tables is the same for every head, so no correlation is defined")
    count = max(1, heads_of_share(fraction, values.shape[1]))
    tops = [set(row.argsort(descending=True, stable=True)[:count].tolist()) for row in values]
    typer.echo(f"Pearson correlation of scores: {float(torch.corrcoef(values)[0, 1]):.3f}")
    typer.echo(f"Spearman correlation of ranks: {rank_correlation(*values):.3f}")
    typer.echo(f"total variation distance:      {float((values[0] - values[1]).abs().sum() / 2):.3f}")
    typer.echo(f"heads in both top {count}:          {len(tops[0] & tops[1])}")

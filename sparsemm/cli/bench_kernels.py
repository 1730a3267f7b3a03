"""`sparsemm bench kernels`: the operators over ragged rows, in time and share of the memory bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import parse_integers, parse_list
from sparsemm.cli.options import DeviceOption, FreshOption, QuietOption, load_scores
from sparsemm.cli.outputs import claim


def kernels(
    shapes: Annotated[str, typer.Option(help="Attention shapes: vicuna-7b, mistral-7b, qwen2-vl-7b, tiny.")] = (
        "vicuna-7b mistral-7b qwen2-vl-7b"
    ),
    prompts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "4096 8192 16384 32768 65536 131072",
    budgets: Annotated[str, typer.Option(help="Mean rows per kv head; full keeps every row.")] = "64 256 1024 full",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1 8 32",
    operations: Annotated[str, typer.Option(help="What to time.")] = (
        "decode append compact window_scores select add_rms_norm rope_append silu_mul"
    ),
    head_scores: Annotated[Path | None, typer.Option(help="Scores for skewed rows; default: synthetic ones.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions; the median counts.")] = 20,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no further cell is begun.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON of the figures; finished cells are kept in it.")] = None,
    fresh: FreshOption = False,
    no_progress: QuietOption = False,
    device: DeviceOption = None,
) -> None:
    """Time the operators beside other backends, plain PyTorch and the original algorithm."""
    from sparsemm.bench.kernels import format_cell, run

    claim(output)
    if head_scores is not None:
        load_scores(head_scores)
    results = run(
        shapes=parse_list(shapes, "--shapes"),
        prompts=parse_integers(prompts, "--prompts"),
        budgets=[None if each == "full" else parse_integers(each, "--budgets")[0] for each in parse_list(budgets)],
        batches=parse_integers(batches, "--batches"),
        operations=parse_list(operations, "--operations"),
        head_scores=head_scores,
        device=device,
        repeats=repeats,
        output=output,
        fresh=fresh,
        time_limit=time_limit,
        progress=not no_progress,
    )
    for cell in results.runs:
        typer.echo(format_cell(cell))
    speed = results.settings["environment"]["copy_bytes_per_second"] / 1e9
    typer.echo(f"{results.settings['device']}: copying moves {speed:.0f} GB/s")

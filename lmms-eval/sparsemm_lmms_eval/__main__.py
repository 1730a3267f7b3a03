"""`python -m sparsemm_lmms_eval`: the grids of the paper's tables. `scripts/eval/*.sh` call it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsemm.cli.common import DEFAULT_MODEL, parse_integers, parse_list, quiet
from sparsemm.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    MethodsOption,
    ModelOption,
    PixelsOption,
    usable_methods,
)
from sparsemm.cli.program import Program, run_program
from sparsemm_lmms_eval.grid import METHODS, Shared, TableSettings, main_grid, parts_grid, ratio_grid

app = Program(help="Evaluate methods and budgets with lmms-eval.")


@dataclass(frozen=True)
class Loading:
    """How the model is loaded and run, beside its settings; those that are None take lmms-eval's defaults."""

    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 1
    device: DeviceOption = None
    dtype: DtypeOption = None
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Smallest image area, where sizes are free.")] = None
    max_pixels: PixelsOption = None
    attn_implementation: Annotated[str, typer.Option(help="transformers' attention for the prompt.")] = "sdpa"
    decode_backend: BackendOption = "auto"
    tensor_parallel: Annotated[
        int | None, typer.Option(min=2, help="Processes (GPUs) that divide each model's layers [default: none].")
    ] = None


@app.command()
def run(
    *,
    model: ModelOption = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option(help="Folder of the cells; finished ones are kept.")] = Path(
        "results/lmms-eval"
    ),
    methods: MethodsOption = "all",
    budgets: Annotated[
        str | None, typer.Option(help="Mean prompt rows kept per kv head [default: the paper's].")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lmms-eval tasks [default: the paper's, miniatures: offline].")
    ] = None,
    short_tasks: Annotated[bool, typer.Option("--short-tasks", help="Add the benchmarks of Table 4.")] = False,
    ablation: Annotated[Literal["ratio", "parts"] | None, typer.Option(help="Table 1 or 2 instead of 3 and 4.")] = None,
    settings: TableSettings,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a cell [default: all, miniatures 200].")] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Data-parallel processes, one a GPU.")] = 1,
    loading: Loading,
) -> None:
    """Evaluate every cell that is not finished in the output folder. Status 1 when one failed."""
    from sparsemm_lmms_eval.runner import run_cells

    given = {name: value for name, value in dataclasses.asdict(loading).items() if value is not None}
    names = list(METHODS) if methods == "all" else parse_list(methods, "--methods")
    if settings.any_head_scores:
        given["any_head_scores"] = True
    shared = Shared(model, settings, limit, given)
    usable = names if ablation else usable_methods(names, shared.head_scores) or names
    chosen_tasks = None if tasks is None else parse_list(tasks, "--tasks")
    chosen_budgets = None if budgets is None else parse_integers(budgets, "--budgets")
    if ablation == "parts":
        cells = parts_grid(shared, chosen_tasks, chosen_budgets)
    elif ablation == "ratio":
        cells = ratio_grid(shared, chosen_tasks, chosen_budgets)
    else:
        cells = main_grid(shared, usable, chosen_budgets, chosen_tasks, short_tasks=short_tasks)
    failed = run_cells(cells, output, num_processes=num_processes, report=typer.echo)
    typer.echo(f"results: {output}\ntable:   sparsemm tables {output}")
    if failed:
        typer.echo(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", err=True)
    if failed or usable != names:
        raise typer.Exit(1)


@app.command(hidden=True)
def cell(request: Path, folder: Path) -> None:
    """One process of a data-parallel cell (called by `run`)."""
    from sparsemm_lmms_eval.runner import run_requested

    run_requested(request, folder)


if __name__ == "__main__":
    quiet(verbose=False)
    run_program(app, "sparsemm_lmms_eval")

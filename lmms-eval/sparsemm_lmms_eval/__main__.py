"""`python -m sparsemm_lmms_eval`: the grids of the paper's tables. `scripts/eval/*.sh` call it."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    MaskMode,
    MaskModeOption,
    MaskRatioOption,
    RatioOption,
    Rounding,
    SeedOption,
    WindowOption,
    parse_integers,
    parse_list,
    quiet,
)
from sparsemm.errors import ConfigError, SparseMMError

app = typer.Typer(
    name="sparsemm_lmms_eval",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="Evaluate methods and budgets with lmms-eval.",
)


class Ablation(str, Enum):
    """Tables 1 and 2 of the paper."""

    ratio = "ratio"
    parts = "parts"


ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint folder, hub id, or a miniature.")]
OutputOption = Annotated[Path, typer.Option(help="Folder of the cells; finished ones are kept.")]
TasksOption = Annotated[str | None, typer.Option(help="lmms-eval tasks [default: the paper's, miniatures: offline].")]
BudgetsOption = Annotated[str | None, typer.Option(help="Mean prompt rows kept per kv head [default: the paper's].")]
ScoresOption = Annotated[Path | None, typer.Option(help="Head-score file [default: head_scores/<model>.json].")]
RoundingOption = Annotated[Rounding | None, typer.Option(help="[default: paper, miniatures exact].")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Documents a cell [default: all, miniatures 200].")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Data-parallel processes, one a GPU.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts generated together.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, auto (spreads a large model over all GPUs).")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")]
PixelsOption = Annotated[int | None, typer.Option(min=1, help="Bound of the area of images (Qwen2-VL).")]
AttentionOption = Annotated[str, typer.Option(help="transformers' attention for the prompt.")]
BackendOption = Annotated[str, typer.Option(help="Who attends to the cached rows: auto, reference, …")]


@app.command()
def run(
    model: ModelOption = DEFAULT_MODEL,
    output: OutputOption = Path("results/lmms-eval"),
    methods: Annotated[str | None, typer.Option(help="Separated by commas or spaces [default: all].")] = None,
    budgets: BudgetsOption = None,
    tasks: TasksOption = None,
    short_tasks: Annotated[bool, typer.Option("--short-tasks", help="Add the benchmarks of Table 4.")] = False,
    ablation: Annotated[Ablation | None, typer.Option(help="Table 1 or 2 instead of 3 and 4.")] = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = None,
    head_scores: ScoresOption = None,
    window_size: WindowOption = None,
    mask_ratio: MaskRatioOption = 0.1,
    mask_mode: MaskModeOption = MaskMode.zero_query,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    num_processes: ProcessesOption = 1,
    batch_size: BatchOption = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    min_pixels: PixelsOption = None,
    max_pixels: PixelsOption = None,
    attn_implementation: AttentionOption = "sdpa",
    decode_backend: BackendOption = "auto",
) -> None:
    """Evaluate every cell that is not finished in the output folder. Status 1 when one failed."""
    from sparsemm_lmms_eval import grid
    from sparsemm_lmms_eval.runner import run_cells

    loading: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": dtype, "min_pixels": min_pixels}
    loading |= {
        "max_pixels": max_pixels,
        "attn_implementation": attn_implementation,
        "decode_backend": decode_backend,
    }
    shared = grid.Shared(
        model=model,
        head_scores=head_scores,
        ratio=ratio,
        rounding=None if rounding is None else rounding.value,
        window_size=window_size,
        mask_ratio=mask_ratio,
        mask_mode=mask_mode.value,
        seed=seed,
        limit=limit,
        loading={name: value for name, value in loading.items() if value is not None},
    )
    chosen_tasks = None if tasks is None else parse_list(tasks)
    chosen_budgets = None if budgets is None else parse_integers(budgets, "--budgets")
    if ablation is None:
        cells = grid.main_grid(
            shared,
            None if methods is None else parse_list(methods),
            chosen_budgets,
            chosen_tasks,
            short_tasks=short_tasks,
        )
    elif ablation is Ablation.parts:
        cells = grid.parts_grid(shared, chosen_tasks, chosen_budgets)
    else:
        if chosen_budgets is not None and len(chosen_budgets) != 1:
            raise ConfigError(f"--budgets {budgets!r}: Table 1 has one budget, give one")
        cells = grid.ratio_grid(shared, chosen_tasks, None if chosen_budgets is None else chosen_budgets[0])
    failed = run_cells(cells, output, num_processes=num_processes, report=typer.echo)
    typer.echo(f"results: {output}\ntable:   sparsemm tables {output}")
    if failed:
        typer.echo(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", err=True)
        raise typer.Exit(1)


@app.command(hidden=True)
def cell(request: Path, folder: Path) -> None:
    """One process of a data-parallel cell (called by `run`)."""
    from sparsemm_lmms_eval.runner import run_requested

    run_requested(request, folder)


def main() -> None:
    """Errors of the package end the program with one line and status 2."""
    quiet(verbose=False)
    logging.getLogger("sparsemm").setLevel(logging.WARNING)
    try:
        app()
    except SparseMMError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

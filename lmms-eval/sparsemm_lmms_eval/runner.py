"""Runs cells one after another: a finished one is skipped, an interrupted one goes on, a failed one is noted."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import logging
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic
from sparsemm.runs.results import environment
from sparsemm.runs.spread import show_spread, spread_of
from sparsemm_lmms_eval import TASKS_FOLDER
from sparsemm_lmms_eval.grid import OFFLINE_TASKS, Cell

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

DONE, FAILED, PROGRESS = "cell.json", "failed.json", "progress"


def run_cells(
    cells: Sequence[Cell], output: Path, *, num_processes: int = 1, report: Callable[[str], None] = print
) -> list[Cell]:
    """Evaluate the cells that are not finished in `output`; returns those that failed.

    `num_processes` are data parallel; where the cells' loading says `tensor_parallel`, each is so many processes that
    hold one model. One process loads a model once for all its cells. Several are a `torchrun` for each cell: were one
    to fail, it could not take the others of later cells with it.

    Raises:
        DataError: A task is neither one of lmms-eval's nor of this package; no cell was begun.
    """
    missing = [cell for cell in cells if not (cell.folder(output) / DONE).is_file()]
    _check_tasks({cell.task for cell in missing})
    report(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before")
    failed = []
    own = _InProcess()
    for number, cell in enumerate(missing, start=1):
        folder = cell.folder(output)
        (folder / FAILED).unlink(missing_ok=True)
        report(f"[{number}/{len(missing)}] {cell.task} {cell.label} ({cell.settings['rounding']} rounding)")
        try:
            started = num_processes * cell.loading.get("tensor_parallel", 1)
            runner = own if started == 1 else _Torchrun(started)
            runner(cell, folder)
            summary = read_json(folder / DONE)["summary"]
        except Exception as error:
            logger.debug("a cell failed", exc_info=True)
            note = {"cell": cell.to_dict(), "error": _reason(error), "trace": traceback.format_exc()}
            write_json_atomic(folder / FAILED, note)
            report(f"    FAILED: {_reason(error)}")
            failed.append(cell)
        else:
            report(f"    {describe(summary)}")
    return failed


def _check_tasks(tasks: Collection[str]) -> None:
    known = _tasks_for(tasks).all_tasks
    if unknown := sorted(set(tasks) - set(known)):
        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "check its name"
        raise DataError(f"task {unknown[0]!r} is not one of lmms-eval's or this package's; {hint}")


def _tasks_for(names: Collection[str]) -> TaskManager:
    """The tasks to choose from; the offline ones need not wait for all of lmms-eval's."""
    return _task_index(with_theirs=not set(names) <= set(OFFLINE_TASKS))


@functools.cache  # reading them takes seconds; a module that keeps state (OCRBench's) is loaded anew with its task
def _task_index(*, with_theirs: bool) -> TaskManager:
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(TASKS_FOLDER), include_defaults=with_theirs)


def describe(summary: dict[str, Any]) -> str:
    """One line on a finished cell."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
    speed = "" if summary["ms_per_token"] is None else f", {show_spread(summary['ms_per_token'], 1)} ms/token"
    return (
        f"{metrics}; effective budget {summary['effective_budget']:.1f}, "
        f"cache {100 * summary['cache_share']:.1f} % of full{speed}, "
        f"{summary['seconds']:.0f} s"
    )


def _reason(error: BaseException) -> str:
    """The first cause of an error: lmms-eval's repeated attempts hide it behind one of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


class _InProcess:
    """One model for all cells that load it alike."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: Any = None

    def __call__(self, cell: Cell, folder: Path) -> None:
        key = json.dumps([cell.model, cell.loading], sort_keys=True)
        if key != self._key:
            self._key = self._model = None
            self._model = load(cell)
            self._key = key
        run_cell(cell, folder, self._model)


class _Torchrun:
    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes

    def __call__(self, cell: Cell, folder: Path) -> None:
        request = folder / "request.json"
        write_json_atomic(request, cell.to_dict())
        # --standalone takes a free port of its own, so that two tables can be made on one machine.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.num_processes}", "-m", "sparsemm_lmms_eval"]
        command += ["cell", str(request), str(folder)]
        code = subprocess.run(command).returncode
        if code or not (folder / DONE).is_file():
            raise DataError(f"the {self.num_processes} processes ended with status {code}; their errors stand above")
        request.unlink()


def load(cell: Cell) -> Any:
    """The lmms-eval model of a cell, its settings included."""
    from lmms_eval.models import get_model

    return get_model("sparsemm")(pretrained=cell.model, **cell.loading, **cell.settings)


def run_cell(cell: Cell, folder: Path, model: Any) -> None:
    """Evaluate one cell with a loaded model; its files are lmms-eval's, and `cell.json`, written last.

    Under `torchrun` all processes call this; the first one writes. Raises `DataError` where lmms-eval wrote no results.
    """
    from lmms_eval import evaluator
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.utils import get_datetime_str

    start = time.perf_counter()
    model.use(progress=folder / PROGRESS, **cell.settings)
    options = ",".join(f"{name}={value}" for name, value in _arguments(cell).items())
    results = evaluator.simple_evaluate(
        model=model,
        model_args=options,
        tasks=[cell.task],
        limit=cell.limit,
        batch_size=model.batch_size,
        task_manager=_tasks_for([cell.task]),
        bootstrap_iters=0,
        log_samples=True,
        # Tasks write their submission files where this says, or into the current folder.
        cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
    )
    if results is None:  # not the first process
        return
    samples = results.pop("samples")
    summary = summarise(results["results"][cell.task], samples[cell.task])
    summary["seconds"] = time.perf_counter() - start
    results["sparsemm"] = {
        "cell": cell.to_dict(),
        "summary": summary,
        "processes": model.world_size,
        "environment": environment(model.device),
    }
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(f"sparsemm_{model.family}", options, "", "", False)
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=get_datetime_str())
    tracker.save_results_samples(task_name=cell.task, samples=samples[cell.task])
    if not list(folder.glob("*/*_results.json")):
        raise DataError(f"lmms-eval wrote no results into {folder}; its log says why")
    write_json_atomic(folder / DONE, results["sparsemm"])


def summarise(metrics: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of a task, those of each of its documents, and the means of their figures.

    `scores` holds the metrics that are means of what the samples hold under their name, in the order of the documents;
    `ms_per_token` is median and quartiles over the documents.
    """
    counts = [sample["token_counts"][0] for sample in samples]
    timed = [count["ms_per_token"] for count in counts if count["ms_per_token"] is not None]
    means = {
        name.partition(",")[0]: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and "_stderr" not in name
    }
    scores = {name: [sample.get(name) for sample in samples] for name in means}
    return {
        "metrics": means,
        "scores": {
            name: values
            for name, values in scores.items()
            if all(isinstance(value, (int, float)) for value in values)
            and math.isclose(statistics.fmean(values), means[name], rel_tol=1e-6, abs_tol=1e-9)
        },
        "documents": len(samples),
        "nominal_budget": counts[0]["nominal_budget"],
        **{
            name: statistics.fmean(count[name] for count in counts)
            for name in (
                *("input_tokens", "output_tokens", "effective_budget"),
                *("cache_bytes", "full_cache_bytes", "cache_share"),
            )
        },
        "ms_per_token": spread_of(timed) if timed else None,
    }


def run_requested(request: Path, folder: Path) -> None:
    """One process of a `torchrun`: the cell of `request`, into `folder`."""
    cell = Cell(**read_json(request))
    try:
        run_cell(cell, folder, load(cell))
    except Exception:
        write_bytes_atomic(folder / "error.txt", traceback.format_exc().encode())
        raise


def _arguments(cell: Cell) -> dict[str, Any]:
    """The model arguments with which lmms-eval's own program would run the cell."""
    values = {"pretrained": cell.model, **cell.loading, **cell.settings}
    return {name: value for name, value in values.items() if value is not None}

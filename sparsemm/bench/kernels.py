"""Micro-benchmark of the operators over ragged rows, beside other backends and the original algorithm.

Every cell gives the time of one call, the bytes it must move, and the share of the measured copy bandwidth that is. On
a GPU the calls of a cell go over several caches in turn, as the layers of a model do, so that nothing is served from
the L2 cache that would not be in real decoding, and are replayed from a CUDA graph where the backend allows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparsemm.bench.kernel_calls import contestants_of
from sparsemm.bench.kernel_cases import SHAPES, Cell, Shape, row_counts, synthetic_head_scores
from sparsemm.bench.measure import copy_bandwidth
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.io import write_json_atomic
from sparsemm.ops import library
from sparsemm.runs.journal import Journal

logger = logging.getLogger(__name__)

OPERATIONS = ("decode", "append", "compact", "window_scores", "select")
WINDOW = 32
_CACHED_BYTES = 256 * 2**20  # caches used in turn hold at least this much, several times any L2
_MEMORY_SHARE = 0.6  # of the device's memory that one cell may take


def grid(
    shapes: tuple[str, ...],
    prompts: tuple[int, ...],
    budgets: tuple[int | None, ...],
    batches: tuple[int, ...],
    operations: tuple[str, ...] = OPERATIONS,
) -> list[Cell]:
    """All cells, without those that repeat another: a full cache has no skew, window_scores no budget."""
    cells = []
    for shape, prompt, budget, batch, operation in itertools.product(shapes, prompts, budgets, batches, operations):
        if shape not in SHAPES:
            raise ConfigError(f"shape {shape!r} is unknown; choose among {', '.join(SHAPES)}")
        if operation not in OPERATIONS:
            raise ConfigError(f"operation {operation!r} is unknown; choose among {', '.join(OPERATIONS)}")
        if budget is None and operation in {"select", "compact"}:
            continue
        skew = ("uniform",) if budget is None or operation == "window_scores" else ("uniform", "skewed")
        if operation == "window_scores" and budget != budgets[0]:
            continue
        cells += [Cell(shape, prompt, budget, batch, each, operation) for each in skew]
    return cells


def time_calls(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> tuple[float, bool]:
    """Median seconds of one call, all calls being made in turn; and whether a CUDA graph replayed them."""
    if device.type != "cuda":
        calls[0]()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            for call in calls:
                call()
            seconds.append((time.perf_counter() - began) / len(calls))
        return statistics.median(seconds), False

    def once() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        once()
    side.synchronize()
    run, captured = once, False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
        run, captured = graph.replay, True
    except RuntimeError as error:  # a backend that synchronises cannot be captured: timed as it is
        logger.debug("not captured: %s", error)
        torch.cuda.synchronize(device)
    run()
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(seconds), captured


def measure_cell(
    cell: Cell, scores: HeadScores, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Times of one cell: {"bytes", "times": {contestant: {"seconds", "graph"}}}, or {"skipped": why}."""
    shape = SHAPES[cell.shape]
    counts = row_counts(shape, cell.budget, cell.prompt, cell.distribution, scores) * cell.batch
    element = torch.empty(0, dtype=dtype).element_size()
    prompt_bytes = 2 * cell.batch * shape.kv_heads * cell.prompt * shape.head_dim * element
    held = 2 * sum(counts) * shape.head_dim * element
    window = min(WINDOW, cell.prompt, min(counts))
    needed = held if cell.operation in {"decode", "append"} else prompt_bytes + held
    if device.type == "cuda" and needed > _MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return {"skipped": f"{needed / 1e9:.0f} GB do not fit"}
    in_turn = max(1, min(shape.layers, _CACHED_BYTES // max(1, needed))) if device.type == "cuda" else 1
    contestants: dict[str, list[Callable[[], Any]]] = {}
    for _ in range(in_turn):
        calls, moved = contestants_of(cell, counts, window, device, dtype, slack=4 * repeats + 64)
        for name, call in calls:
            contestants.setdefault(name, []).append(call)
    times: dict[str, Any] = {}
    for name, each in contestants.items():
        if name in {"original", "reference"} and len(each) > 2:
            each = each[:2]
        try:
            seconds, graph = time_calls(each, device, repeats)
        except RuntimeError as error:
            times[name] = {"error": str(error).splitlines()[0][:200]}
            continue
        times[name] = {"seconds": seconds, "graph": graph}
    return {"bytes": moved, "caches_in_turn": in_turn, "rows": sum(counts), "times": times}


def run(
    *,
    shapes: tuple[str, ...] = ("vicuna-7b", "mistral-7b", "qwen2-vl-7b"),
    prompts: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072),
    budgets: tuple[int | None, ...] = (64, 256, 1024, None),
    batches: tuple[int, ...] = (1, 8, 32),
    operations: tuple[str, ...] = OPERATIONS,
    head_scores: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    repeats: int = 20,
    output: Path | None = None,
    resume: bool = True,
    time_limit: float | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every cell of the grid; cells are kept in a journal beside `output` as they finish.

    Args:
        head_scores: A score file for the skewed row counts; by default the synthetic table. Must fit every shape.
        device, dtype: By default the GPU and bfloat16, or the CPU and float32.
        output: JSON file; `<output>.cells.jsonl` holds finished cells, which a later run with the same settings keeps.
        time_limit: Seconds after which no further cell is begun; the next run with the same settings goes on.
        report: Called with one line per finished cell.

    Returns:
        {"device", "dtype", "torch", "kernels", "copy_gb_per_s", "complete", "cells": [...]}: each cell with its
        settings, `bytes`, and per contestant `seconds`, `gb_per_s` and `of_copy_bandwidth`.

    Raises:
        ConfigError: A shape or operation is unknown.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    cells = grid(shapes, prompts, budgets, batches, operations)
    settings = {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "head_scores": None if head_scores is None else str(head_scores),
        "repeats": repeats,
    }
    bandwidth = copy_bandwidth(device)
    journal = Journal(None if output is None else output.with_suffix(".cells.jsonl"), settings, resume=resume)
    began = time.monotonic()
    with journal, torch.inference_mode():
        for index, cell in enumerate(tqdm(cells, desc="kernels", disable=not progress)):
            if index not in journal.records:
                if time_limit is not None and time.monotonic() - began > time_limit:
                    continue
                scores = _scores(head_scores, SHAPES[cell.shape])
                journal.append(index, measure_cell(cell, scores, device, dtype, repeats))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            if report is not None:
                report(format_cell(cell, journal.records[index], bandwidth))
    results = {
        "device": settings["device"],
        "dtype": str(dtype),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": {part: library.is_loaded(part) for part in ("cpu", "cuda")},
        "copy_gb_per_s": bandwidth / 1e9,
        "complete": len(journal.records) == len(cells),
        "cells": [_with_rates(cells[index], record, bandwidth) for index, record in sorted(journal.records.items())],
    }
    if output is not None:
        write_json_atomic(output, results)
    return results


def _scores(path: str | Path | None, shape: Shape) -> HeadScores:
    return synthetic_head_scores(shape.layers, shape.query_heads) if path is None else HeadScores.load(path)


def _with_rates(cell: Cell, record: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    times = {}
    for name, value in record.get("times", {}).items():
        times[name] = dict(value)
        if "seconds" in value:
            rate = record["bytes"] / value["seconds"]
            times[name] |= {"gb_per_s": rate / 1e9, "of_copy_bandwidth": rate / bandwidth}
    return {**dataclasses.asdict(cell), **record, **({"times": times} if times else {})}


def format_cell(cell: Cell, record: dict[str, Any], bandwidth: float) -> str:
    """One line: the cell, its bytes, and per contestant microseconds and share of the copy bandwidth."""
    if "skipped" in record:
        return f"{cell.label()}: skipped, {record['skipped']}"
    parts = []
    for name, value in record["times"].items():
        if "seconds" in value:
            share = record["bytes"] / value["seconds"] / bandwidth
            parts.append(f"{name} {1e6 * value['seconds']:.1f} us ({100 * share:.0f} %)")
        else:
            parts.append(f"{name} failed")
    return f"{cell.label()}: {record['bytes'] / 1e6:.1f} MB; {', '.join(parts)}"

"""Micro-benchmark of the operators over ragged rows, beside other backends and the original algorithm.

Every cell gives the time of one call, the bytes it must move, and the share of the measured copy bandwidth that is. On
a GPU the calls of a cell go over several caches in turn, as the layers of a model do, so that nothing is served from
the L2 cache that would not be in real decoding, and are replayed from a CUDA graph where the backend allows it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsemm.bench.cells import OK, BenchCell, BenchResults, Tell, Times, check_axes, run_benchmark, take_turns
from sparsemm.bench.kernel_calls import CALLS, ONE_TOKEN, Workspace, row_counts
from sparsemm.bench.memory import copy_bandwidth
from sparsemm.bench.shapes import SHAPES, attention_shape, shape_config, skewed_head_scores
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.models.loading import resolve_device
from sparsemm.ops import library
from sparsemm.runs.spread import show_spread, spread_of

logger = logging.getLogger(__name__)

_CACHED_BYTES = 256 * 2**20  # caches used in turn hold at least this much, several times any L2
_MEMORY_SHARE = 0.6  # of the device's memory that one cell may take


def grid(
    shapes: Sequence[str],
    prompts: Sequence[int],
    budgets: Sequence[int | None],
    batches: Sequence[int],
    operations: Sequence[str] = tuple(CALLS),
) -> list[dict[str, Any]]:
    """All places, without those that repeat another: a full cache has no skew, window_scores no budget.

    Raises:
        ConfigError: A shape or operation is unknown, or a number below 1.
    """
    check_axes({"prompts": prompts, "budgets": budgets, "batches": batches})
    for name, known, asked in (("shape", SHAPES, shapes), ("operation", CALLS, operations)):
        if unknown := [each for each in asked if each not in known]:
            raise ConfigError(f"{name} {unknown[0]!r} is unknown; choose among {', '.join(known)}")
    places = []
    for shape, prompt, budget, batch, operation in itertools.product(shapes, prompts, budgets, batches, operations):
        if budget is None and operation in {"select", "compact"}:
            continue
        if operation in ("window_scores", *ONE_TOKEN) and budget != budgets[0]:
            continue
        if operation in ONE_TOKEN and prompt != prompts[0]:
            continue
        alike = budget is None or operation in ("window_scores", *ONE_TOKEN)
        skew = ("uniform",) if alike else ("uniform", "skewed")
        names = ("shape", "prompt", "budget", "batch", "distribution", "operation")
        places += [dict(zip(names, (shape, prompt, budget, batch, each, operation), strict=True)) for each in skew]
    return places


def time_calls(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> tuple[list[float], bool]:
    """Seconds of one call in every repetition, all calls being made in turn; and whether a CUDA graph replayed them."""

    def once() -> None:
        for call in calls:
            call()

    run, captured = once, False
    if device.type == "cuda":
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            once()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                once()
            run, captured = graph.replay, True
        except RuntimeError as error:  # a backend that synchronises cannot be captured: timed as it is
            logger.debug("not captured: %s", error)
            torch.cuda.synchronize(device)
    return [seconds / len(calls) for seconds in take_turns({"": run}, repeats, device)[""]], captured


@dataclass
class Kernels:
    """How cells are measured; called with a place, it gives its times by contestant, and its bytes and shares."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    bandwidth: float
    head_scores: str | Path | None = None

    def __call__(self, place: dict[str, Any], tell: Tell) -> tuple[Times, dict[str, Any]]:
        config, operation = shape_config(place["shape"]), place["operation"]
        shape = attention_shape(config)
        if self.head_scores is None:
            scores = skewed_head_scores(shape.layers, shape.query_heads)
        else:
            scores = HeadScores.load(self.head_scores)
        counts = row_counts(shape, place["budget"], place["prompt"], place["distribution"], scores) * place["batch"]
        slack = 4 * self.repeats + 64
        intermediate_size = config.get_text_config().intermediate_size
        work = Workspace(
            shape, place["batch"], place["prompt"], counts, self.device, self.dtype, slack, intermediate_size
        )
        needed = work.held_bytes + (0 if operation in {"decode", "append", *ONE_TOKEN} else work.prompt_bytes)
        in_turn = 1
        if self.device.type == "cuda":
            if needed > _MEMORY_SHARE * torch.cuda.get_device_properties(self.device).total_memory:
                raise ConfigError(f"{needed / 1e9:.0f} GB do not fit")
            in_turn = max(1, min(shape.layers, _CACHED_BYTES // max(1, needed)))
        contestants: dict[str, list[Callable[[], Any]]] = {}
        for _ in range(in_turn):
            calls, moved = CALLS[operation](work)
            for name, call in calls.items():
                contestants.setdefault(name, []).append(call)
        times: Times = {}
        figures: dict[str, Any] = {"bytes": moved, "caches_in_turn": in_turn, "rows": sum(counts)}
        figures |= {"graph": {}, "of_copy_bandwidth": {}, "failed": {}}
        for name, each in contestants.items():
            tell(name)
            # The plain ways are slow, and their caches need not be cold for that.
            chosen = each[:2] if name in {"original", "reference"} else each
            try:
                times[name], figures["graph"][name] = time_calls(chosen, self.device, self.repeats)
            except RuntimeError as error:
                figures["failed"][name] = str(error).splitlines()[0][:200]
                continue
            figures["of_copy_bandwidth"][name] = moved / spread_of(times[name])["median"] / self.bandwidth
        return times, figures


def run(
    *,
    shapes: Sequence[str] = ("vicuna-7b", "mistral-7b", "qwen2-vl-7b"),
    prompts: Sequence[int] = (4096, 8192, 16384, 32768, 65536, 131072),
    budgets: Sequence[int | None] = (64, 256, 1024, None),
    batches: Sequence[int] = (1, 8, 32),
    operations: Sequence[str] = tuple(CALLS),
    head_scores: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    repeats: int = 20,
    output: Path | None = None,
    fresh: bool = False,
    time_limit: float | None = None,
    progress: bool = True,
) -> BenchResults:
    """Measure every cell of the grid that `output` does not hold yet; each finished one is in the file at once.

    Args:
        head_scores: A score file for the skewed row counts; by default synthetic ones. Must fit every shape.
        device, dtype: By default ("auto") the GPU and bfloat16, or the CPU and float32.
        output: Result file (JSON).
        fresh: Forget what it holds.
        time_limit: Seconds after which no further cell is begun; the next run with the same settings goes on.

    Raises:
        ConfigError: A shape, operation or device is unknown, or a number below 1.
        DataError: `output` holds results of other settings.
    """
    places = grid(shapes, prompts, budgets, batches, operations)
    device = torch.device(resolve_device(None if device == "auto" else device))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    bench = Kernels(device, dtype, repeats, copy_bandwidth(device), head_scores)
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "head_scores": None if head_scores is None else str(head_scores),
        "repeats": repeats,
        "environment": {
            "kernels": {part: library.is_loaded(part) for part in ("cpu", "cuda")},
            "copy_bytes_per_second": bench.bandwidth,
        },
    }
    with torch.inference_mode():
        return run_benchmark(
            "kernels", places, bench, device=device, settings=settings, output=output, fresh=fresh,
            time_limit=time_limit, progress=progress,
        )  # fmt: skip


def format_cell(cell: BenchCell) -> str:
    """One line: the cell, its bytes, and per contestant microseconds (quartiles) and share of the copy bandwidth."""
    place, figures = cell.place, cell.figures
    budget = "full" if place["budget"] is None else place["budget"]
    label = f"{place['shape']} T={place['prompt']} b={budget} B={place['batch']} {place['distribution']}"
    if cell.status != OK:
        return f"{label} {place['operation']}: skipped, {cell.status}"
    shares = figures["of_copy_bandwidth"].items()
    parts = [f"{name} {show_spread(cell.times[name], 1, 1e6)} us, {100 * share:.0f} %" for name, share in shares]
    parts += [f"{name} failed" for name in figures["failed"]]
    return f"{label} {place['operation']}: {figures['bytes'] / 1e6:.1f} MB; {'; '.join(parts)}"

"""Tables and the efficiency figure of `sparsemm.bench.e2e`, beside the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemm.bench.cells import OK, BenchCell, BenchResults
from sparsemm.errors import DataError
from sparsemm.runs.lines import Panel, draw_panels
from sparsemm.runs.markdown import markdown_table, table_of
from sparsemm.runs.plots import LABELS
from sparsemm.runs.spread import show_spread

PAPER_SPEEDUP = {8192: 1.16, 16384: 1.5, 32768: 1.87}
"""Decoding speed-up of SparseMM over the full cache by prompt length: LLaVA-NeXT-Vicuna-7B, budget 256."""

PAPER_LATENCY_16K = {"fullkv": 52.9, "sparsemm": 37.1, "snapkv": 35.3, "pyramidkv": 34.9, "adakv": 37.3}
"""Milliseconds a token at 16K tokens, the same model and budget."""

PAPER_MEMORY_32K = {"fullkv": 32.87, "sparsemm": 17.38}
"""Gigabytes at 32K tokens, the same model and budget."""

_NAMES = {
    **LABELS,
    "hf": "Full cache, model.generate",
    "fullkv": "Full cache, this loop",
    "kvpress": "kvpress SnapKV",
    "original": "SparseMM, copied per token",
}


def format_tables(results: BenchResults) -> str:
    """Markdown: time and memory of every latency cell, the largest batches, and the paper's figures where they apply.

    Raises:
        DataError: There is no cell.
    """
    if not results.runs:
        raise DataError("there is no result to show; run the benchmark first")
    latency, throughput = _of_kind(results, "latency"), _of_kind(results, "throughput")
    place = {"prompt": _place("prompt_tokens"), "method": _place("method"), "budget": _place("budget")}
    failed = [cell for cell in results.runs if cell.status != OK]
    columns = {
        "first token ms": lambda cell: show_spread(cell.times["first_token"], 1, 1000),
        "ms/token": lambda cell: show_spread(cell.times["step"], 2, 1000),
        "tokens/s": _figure("tokens_per_second", "{:.1f}"),
        "x hf": lambda cell: _shown(_ratio(results, cell, "hf")),
        "x full, same loop": lambda cell: _shown(_ratio(results, cell, "fullkv")),
        "graph": lambda cell: "yes" if cell.figures["graph"] else "no",
        "floor share": _figure("floor_share", "{:.0f} %", 0.01),
        "cache MB": _figure("cache_bytes", "{:,.1f}", 1e6),
        "peak MB": _figure("peak_bytes", "{:,.1f}", 1e6),
        "rest MB": _figure("rest_bytes", "{:,.1f}", 1e6),
        "kernels/step": lambda cell: _shown(cell.figures["kernels"] or cell.figures["launches"], "{}"),
    }
    if results.settings.get("tensor_parallel"):
        columns["cache MB a process"] = _by_rank
        columns["KB sent/token"] = _figure("sent_bytes", "{:,.1f}", 1e3)
    parts = []
    if latency:
        parts.append(table_of(latency, {**place, "batch": _place("batch"), **columns}, left=2))
    columns = {
        "largest batch": _figure("largest_batch", "{}"),
        "ms/step": lambda cell: show_spread(cell.times["step"], 2, 1000),
        "tokens/s": _figure("tokens_per_second", "{:,.0f}"),
        "cache MB a sequence": _figure("bytes_per_sequence", "{:,.1f}", 1e6),
    }
    if throughput:
        parts.append(table_of(throughput, {**place, **columns}, left=2))
    if failed:
        parts.append(table_of(failed, {"kind": _place("kind"), **place, "why not": lambda cell: cell.status}, left=5))
    if "vicuna" in results.settings["model"].lower():
        parts.append(_paper_table(results))
    return "\n\n".join(parts)


def _place(name: str) -> Any:
    return lambda cell: _shown(cell.place[name], "{}")


def _figure(name: str, form: str, unit: float = 1) -> Any:
    return lambda cell: _shown(cell.figures.get(name), form, unit)


def _by_rank(cell: BenchCell) -> str:
    held = cell.figures.get("cache_bytes_by_rank") or ()
    return " / ".join(f"{each / 1e6:,.1f}" for each in held)


def _shown(value: Any, form: str = "{:.2f}", unit: float = 1) -> str:
    if value is None:
        return ""
    return form.format(value if unit == 1 else value / unit)


def _paper_table(results: BenchResults) -> str:
    """Each of the paper's figures beside what was measured at its setting; empty where nothing was."""

    def measured(method: str, prompt: int) -> BenchCell | None:
        return _find(results, "hf" if method == "fullkv" else method, prompt, 256)

    rows = []
    for prompt, speedup in PAPER_SPEEDUP.items():
        cell = measured("sparsemm", prompt)
        for name, baseline in (("hf", "model.generate"), ("fullkv", "the same loop")):
            ratio = None if cell is None else _ratio(results, cell, name)
            what = f"speed-up over the full cache by {baseline}, {prompt // 1024}K"
            rows.append([what, f"{speedup}", _shown(ratio)])
    for method, latency in PAPER_LATENCY_16K.items():
        cell = measured(method, 16384)
        rows.append([f"ms/token at 16K, {method}", f"{latency}", _shown(cell and cell.ms("step"))])
    for method, memory in PAPER_MEMORY_32K.items():
        cell = measured(method, 32768)
        rows.append([f"peak GB at 32K, {method}", f"{memory}", _shown(cell and cell.figures["peak_bytes"] / 1e9)])
    return markdown_table(["LLaVA-NeXT-Vicuna-7B, budget 256", "paper", "measured"], rows)


def plot_efficiency(results: BenchResults, path: str | Path, *, budget: int | None = None) -> None:
    """Latency and peak memory against prompt length, one line a method, batch 1.

    Args:
        results: What `sparsemm.bench.e2e.run` returned.
        path: Image file; its ending chooses the format (png, svg, pdf).
        budget: Of the methods that have one; by default the smallest measured.

    Raises:
        DataError: No finished cell of batch 1, or an unknown file ending.
    """
    cells = [cell for cell in _of_kind(results, "latency") if cell.place["batch"] == 1]
    budgets = [cell.place["budget"] for cell in cells if cell.place["budget"] is not None]
    budget = min(budgets, default=None) if budget is None else budget
    cells = [cell for cell in cells if cell.place["budget"] in (None, budget)]
    if not cells:
        raise DataError("no latency of batch 1 was measured, so there is nothing to draw")
    large = max(cell.figures["peak_bytes"] for cell in cells) > 1e9
    unit, name = (1e9, "Peak memory (GB)") if large else (1e6, "Peak memory (MB)")
    latency, memory = Panel(y_label="ms per token", group="ms"), Panel(y_label=name, group="GB")  # a range each
    for cell in cells:
        method, prompt = cell.place["method"], cell.place["prompt_tokens"]
        latency.add(method, prompt, cell.ms("step"))
        memory.add(method, prompt, cell.figures["peak_bytes"] / unit)
    settings = results.settings
    title = f"{settings['model']}, {settings['dtype']}, {settings['environment']['hardware']}"
    draw_panels(
        [[latency, memory]],
        path,
        x_label="Prompt (tokens)",
        x_form=lambda value: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}",
        labels=_NAMES,
        title=title if budget is None else f"{title}, budget {budget}",
    )


def _of_kind(results: BenchResults, kind: str) -> list[BenchCell]:
    """Finished cells of one kind."""
    return [cell for cell in results.runs if cell.place["kind"] == kind and cell.status == OK]


def _find(results: BenchResults, method: str, prompt: int, budget: int | None, batch: int = 1) -> BenchCell | None:
    for cell in _of_kind(results, "latency"):
        same = [cell.place[name] for name in ("method", "prompt_tokens", "batch")] == [method, prompt, batch]
        if same and cell.place["budget"] in (None, budget):
            return cell
    return None


def _ratio(results: BenchResults, cell: BenchCell, baseline: str) -> float | None:
    """How many times faster a step of `cell` is than the baseline's at the same prompt and batch."""
    other = _find(results, baseline, cell.place["prompt_tokens"], None, cell.place["batch"])
    return None if other is None else other.ms("step") / cell.ms("step")

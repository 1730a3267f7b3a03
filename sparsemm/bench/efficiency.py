"""Tables and the efficiency figure of `sparsemm.bench.e2e`, beside the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemm.errors import DataError
from sparsemm.runs.markdown import markdown_table
from sparsemm.runs.plots import LABELS, log2_axis, method_lines, new_figure, plain_axes, save_figure

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


def format_tables(document: dict[str, Any]) -> str:
    """Markdown: time and memory of every latency cell, the largest batches, and the paper's figures where they apply.

    Raises:
        DataError: There is no cell.
    """
    if not document["cells"]:
        raise DataError("there is no result to show; run the benchmark first")
    parts = [_latency_table(document)]
    if any(cell["kind"] == "throughput" for cell in document["cells"]):
        parts.append(_throughput_table(document))
    if "vicuna" in document["settings"]["model"].lower():
        parts.append(_paper_table(document))
    return "\n\n".join(part for part in parts if part)


def _latency_table(document: dict[str, Any]) -> str:
    header = [
        *("prompt", "batch", "method", "budget", "first token ms", "ms/token", "tokens/s", "x hf", "x full, same loop"),
        *("graph", "floor share", "cache MB", "peak MB", "rest MB", "launches"),
    ]
    rows = []
    for cell in _of_kind(document, "latency"):
        place = [str(cell["prompt_tokens"]), str(cell["batch"]), cell["method"], _or_dash(cell["budget"], "{}")]
        if cell["status"] != "ok":
            rows.append([*place, cell["status"], *[""] * (len(header) - 5)])
            continue
        rows.append(
            [
                *place,
                f"{cell['ttft_ms']:.1f}",
                f"{cell['ms_per_token']:.2f}",
                f"{cell['tokens_per_second']:.1f}",
                _or_dash(_ratio(document, cell, "hf"), "{:.2f}"),
                _or_dash(_ratio(document, cell, "fullkv"), "{:.2f}"),
                "yes" if cell["graph"] else "no",
                f"{100 * cell['floor_share']:.0f} %",
                _or_dash(cell["cache_bytes"], "{:,.1f}", 1e6),
                _or_dash(cell["peak_bytes"], "{:,.1f}", 1e6),
                _or_dash(cell["rest_bytes"], "{:,.1f}", 1e6),
                _or_dash(cell["kernels"] or cell["launches"], "{}"),
            ]
        )
    return markdown_table(header, rows)


def _throughput_table(document: dict[str, Any]) -> str:
    header = ["prompt", "method", "budget", "largest batch", "ms/step", "tokens/s", "cache MB a sequence"]
    rows = []
    for cell in _of_kind(document, "throughput"):
        place = [str(cell["prompt_tokens"]), cell["method"], _or_dash(cell["budget"], "{}")]
        if cell["status"] != "ok":
            rows.append([*place, cell["status"], "", "", ""])
            continue
        per_sequence = f"{cell['bytes_per_sequence'] / 1e6:,.1f}"
        rows.append(
            [
                *place,
                *(str(cell["largest_batch"]), f"{cell['ms_per_step']:.2f}", f"{cell['tokens_per_second']:,.0f}"),
                per_sequence,
            ]
        )
    return markdown_table(header, rows)


def _paper_table(document: dict[str, Any]) -> str:
    """Each of the paper's figures beside what was measured at its setting; empty where nothing was."""
    rows = []
    for prompt, speedup in PAPER_SPEEDUP.items():
        cell = _find(document, "sparsemm", prompt, 256)
        for name, baseline in (("hf", "model.generate"), ("fullkv", "the same loop")):
            measured = None if cell is None else _ratio(document, cell, name)
            rows.append(
                [f"speed-up over the full cache by {baseline}, {prompt // 1024}K", f"{speedup}", _or_dash(measured)]
            )
    for method, latency in PAPER_LATENCY_16K.items():
        cell = _find(document, "hf" if method == "fullkv" else method, 16384, 256)
        rows.append(
            [f"ms/token at 16K, {method}", f"{latency}", _or_dash(None if cell is None else cell["ms_per_token"])]
        )
    for method, memory in PAPER_MEMORY_32K.items():
        cell = _find(document, "hf" if method == "fullkv" else method, 32768, 256)
        peak = None if cell is None else cell["peak_bytes"]
        rows.append([f"peak GB at 32K, {method}", f"{memory}", _or_dash(peak, "{:.2f}", 1e9)])
    return markdown_table(["LLaVA-NeXT-Vicuna-7B, budget 256", "paper", "measured"], rows)


def plot_efficiency(document: dict[str, Any], path: str | Path, *, budget: int | None = None) -> None:
    """Latency and peak memory against prompt length, one line a method, batch 1.

    Args:
        document: What `sparsemm.bench.e2e.run` returned.
        path: Image file; its ending chooses the format (png, svg, pdf).
        budget: Of the methods that have one; by default the smallest measured.

    Raises:
        DataError: No finished cell of batch 1, or an unknown file ending.
    """
    cells = [cell for cell in _of_kind(document, "latency") if cell["status"] == "ok" and cell["batch"] == 1]
    budgets = [cell["budget"] for cell in cells if cell["budget"] is not None]
    budget = min(budgets, default=None) if budget is None else budget
    cells = [cell for cell in cells if cell["budget"] in (None, budget)]
    if not cells:
        raise DataError("no latency of batch 1 was measured, so there is nothing to draw")
    large = max(cell["peak_bytes"] for cell in cells) > 1e9
    label, unit = ("Peak memory (GB)", 1e9) if large else ("Peak memory (MB)", 1e6)
    figure = new_figure(9.5, 3.9)
    panels = (("ms_per_token", "ms per token", 1.0), ("peak_bytes", label, unit))
    for axes, (field, name, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            lines.setdefault(cell["method"], []).append((cell["prompt_tokens"], cell[field] / scale))
        method_lines(axes, lines, {}, _NAMES)
        log2_axis(axes, [cell["prompt_tokens"] for cell in cells], "Prompt (tokens)", _tokens)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(name)
        plain_axes(axes)
    settings = document["settings"]
    hardware = document.get("environment", {}).get("hardware", settings["device"])
    title = f"{settings['model']}, {settings['dtype']}, {hardware}"
    figure.suptitle(title if budget is None else f"{title}, budget {budget}", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def _tokens(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"


def _of_kind(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in document["cells"] if cell["kind"] == kind]


def _find(
    document: dict[str, Any], method: str, prompt: int, budget: int | None, batch: int = 1
) -> dict[str, Any] | None:
    for cell in _of_kind(document, "latency"):
        same = cell["method"] == method and cell["prompt_tokens"] == prompt and cell["batch"] == batch
        if same and cell["status"] == "ok" and cell["budget"] in (None, budget):
            return cell
    return None


def _ratio(document: dict[str, Any], cell: dict[str, Any], baseline: str) -> float | None:
    """How many times faster a step of `cell` is than the baseline's at the same prompt and batch."""
    other = _find(document, baseline, cell["prompt_tokens"], None, cell["batch"])
    return None if other is None else other["ms_per_token"] / cell["ms_per_token"]


def _or_dash(value: float | None, form: str = "{:.2f}", scale: float = 1) -> str:
    if value is None:
        return ""
    return form.format(value / scale if scale != 1 else value)

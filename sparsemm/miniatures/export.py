"""From a training run to a Hugging Face folder: `python -m sparsemm.miniatures.export --family qwen2-vl`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic
from sparsemm.miniatures.architectures import FAMILIES, build_model, build_processor
from sparsemm.miniatures.reading import read_pages
from sparsemm.miniatures.stages import CURRICULUM

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "miniatures"
"""Where a checkout keeps the trained miniatures."""


def export(family: str, *, run: str | Path | None = None, output: str | Path | None = None) -> Path:
    """Writes the running mean of a run's weights as a bfloat16 checkpoint with processor and chat template.

    `run` defaults to `runs/miniatures/<family>`, `output` to `assets/miniatures/<family>` of the checkout. Returns the
    folder. Raises `DataError` when the run has no checkpoint.
    """
    from safetensors.torch import load_file

    source = Path(run) if run is not None else Path("runs/miniatures") / family
    target = Path(output) if output is not None else ASSETS / family
    progress = read_json(source / "progress.json")
    if progress["family"] != family:
        raise DataError(f"{source} holds a run of {progress['family']}, not of {family}; choose another folder")
    tensors = load_file(source / f"step-{progress['total_steps']}.safetensors")
    model = build_model(family, seed=progress["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"average.{name}"])
    target.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(target)
    build_processor(family).save_pretrained(target)
    stage = progress["stage"]
    history = {
        "seed": progress["seed"],
        "steps": progress["total_steps"],
        "steps_by_stage": progress.get("history", {}),
        "stage_under_way": CURRICULUM[stage].name if stage < len(CURRICULUM) else None,
        "started_from": progress.get("started_from"),
        "minutes": round(progress["seconds"] / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    write_json_atomic(target / "training.json", history)
    return target


def _table(reading: dict) -> str:
    lines = ["| task | words | pages | character accuracy | exact match | ANLS |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for task, groups in reading["tasks"].items():
        for words, row in groups.items():
            values = " | ".join(f"{row[name]:.3f}" for name in ("accuracy", "exact_match", "anls"))
            lines.append(f"| {task} | {words} | {row['pages']} | {values} |")
    return "\n".join(lines)


def write_card(folder: str | Path, family: str, reading: dict) -> None:
    """Writes `README.md`, the model card, beside an exported checkpoint."""
    target = Path(folder)
    config = read_json(target / "config.json")
    text = config["text_config"]
    training = read_json(target / "training.json")
    stage = training["stage_under_way"]
    origin = training["started_from"]
    start = f"\n  It began with the weights of an earlier run ({origin}; `--start-from`)." if origin else ""
    state = "the whole curriculum" if stage is None else f'the curriculum up to its stage "{stage}"'
    lengths = ", ".join(f"{name} {steps}" for name, steps in training["steps_by_stage"].items())
    card = f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# Miniature {family}

A `{config["architectures"][0]}` of {training["parameters"] / 1e6:.2f} M parameters that reads synthetic documents: the
same classes, file formats and code path as a 7B model, small enough to run anywhere. It is not a general model: it
knows lower-case letters and digits, one to a 16-pixel cell, on 224-pixel pages.

- Language model: {text["num_hidden_layers"]} layers, {text["num_attention_heads"]} query heads,
  {text["num_key_value_heads"]} key/value heads, hidden size {text["hidden_size"]}.
- Two questions: "Provide all the OCR results of this image." and "What is the <field>?".
- Training: `python -m sparsemm.miniatures.train --family {family} --seed {training["seed"]}`, {state}:
  {training["steps"]} steps, {training["minutes"]} minutes on one CPU core.{start}
  Steps by stage, the earlier run's included (`--steps STAGE=N`): {lengths}.
- Export: `python -m sparsemm.miniatures.export --family {family}` (running mean of the weights).
  A longer run continues from its checkpoints with `--resume`.

Held-out pages (fonts and words of no training page), {reading["pages_each"]} for each number of words; greedy, bfloat16
weights run in float32:

{_table(reading)}
"""
    write_bytes_atomic(target / "README.md", card.encode("utf-8"))


def main() -> None:
    """Command line: exports, measures the reading of held-out pages, and writes the model card."""
    parser = argparse.ArgumentParser(description="Export a trained miniature and measure how well it reads.")
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--run", type=Path, help="training folder (default: runs/miniatures/<family>)")
    parser.add_argument("--output", type=Path, help="target (default: assets/miniatures/<family>)")
    parser.add_argument("--pages", type=int, default=50, help="held-out pages for each number of words")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = export(arguments.family, run=arguments.run, output=arguments.output)
    reading = read_pages(folder, pages=arguments.pages)
    write_json_atomic(folder / "reading.json", reading)
    write_card(folder, arguments.family, reading)
    logger.info("%s", json.dumps(reading["summary"]))


if __name__ == "__main__":
    main()

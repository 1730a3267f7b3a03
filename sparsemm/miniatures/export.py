"""From a training run to a Hugging Face folder with its reading and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic
from sparsemm.miniatures.architectures import build_model, build_processor
from sparsemm.miniatures.reading import read_pages
from sparsemm.miniatures.stages import CURRICULUM


def export(family: str, source: Path, target: Path, *, pages: int = 50) -> dict[str, Any]:
    """Writes the running mean of the weights of the run in `source` as a bfloat16 checkpoint, ready for `load_model`.

    Beside it lie `training.json`, `reading.json` (the reading of `pages` held-out pages for each number of words,
    which is returned) and the card. Raises `DataError` when `source` holds no checkpoint, or another family's.
    """
    from safetensors.torch import load_file

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
        "minutes": round(progress["seconds"] / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    write_json_atomic(target / "training.json", history)
    reading = read_pages(target, pages=pages)
    write_json_atomic(target / "reading.json", reading)
    write_bytes_atomic(
        target / "README.md", _card(family, read_json(target / "config.json"), history, reading).encode()
    )
    return reading


def _table(reading: dict) -> str:
    lines = ["| task | words | pages | character accuracy | exact match | ANLS |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for task, groups in reading["tasks"].items():
        for words, row in groups.items():
            values = " | ".join(f"{row[name]:.3f}" for name in ("accuracy", "exact_match", "anls"))
            lines.append(f"| {task} | {words} | {row['pages']} | {values} |")
    return "\n".join(lines)


def _card(family: str, config: dict, training: dict, reading: dict) -> str:
    text = config["text_config"]
    stage = training["stage_under_way"]
    state = "the whole curriculum" if stage is None else f'the curriculum up to its stage "{stage}"'
    lengths = ", ".join(f"{name} {steps}" for name, steps in training["steps_by_stage"].items())
    return f"""---
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
- Training: `sparsemm miniatures train --family {family} --seed {training["seed"]}`, {state}:
  {training["steps"]} steps, {training["minutes"]} minutes on one CPU core.
  Steps by stage: {lengths}. The weights are their running mean (`sparsemm miniatures export`).

Held-out pages (fonts and words of no training page), {reading["pages_each"]} for each number of words; greedy, bfloat16
weights run in float32:

{_table(reading)}
"""

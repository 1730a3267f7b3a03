"""From a training run to a Hugging Face folder with its reading and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic
from sparsemm.miniatures.architectures import DIMENSIONS, build_processor
from sparsemm.miniatures.reading import read_pages
from sparsemm.miniatures.train import Trainer


def export(trainer: Trainer, target: Path, *, pages: int = 50) -> dict[str, Any]:
    """Writes the running mean of a run's weights as a bfloat16 checkpoint with its processor, ready for `load_model`.

    Beside it lie `training.json`, `reading.json` (the reading of `pages` held-out pages for each number of words,
    which is returned) and the card.
    """
    progress = trainer.progress
    target.mkdir(parents=True, exist_ok=True)
    with trainer.mean_weights():
        weights = {name: value.to(torch.bfloat16) for name, value in trainer.model.state_dict().items()}
        trainer.model.save_pretrained(target, state_dict=weights)
    build_processor(progress.family).save_pretrained(target)
    training = {
        "seed": progress.seed,
        "threads": progress.threads,
        "steps": progress.total_steps,
        "steps_by_stage": progress.history,
        "heldout_accuracy_by_stage": {stage: accuracy for stage, _, _, accuracy in progress.curve},
        "stage_under_way": trainer.stage and trainer.stage.name,
        "started_from": None,
        "minutes": round(progress.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }
    write_json_atomic(target / "training.json", training)
    reading = read_pages(target, pages=pages, size=DIMENSIONS[progress.family].page_size)
    write_json_atomic(target / "reading.json", reading)
    card = _card(progress.family, read_json(target / "config.json"), training, reading)
    write_bytes_atomic(target / "README.md", card.encode())
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
    state = "the whole curriculum" if stage is None else f'stopped in its stage "{stage}"'
    threads = training["threads"]
    ends = training["heldout_accuracy_by_stage"]
    stages = ", ".join(
        f"{name} {steps} ({ends.get(name, 0):.3f})" for name, steps in training["steps_by_stage"].items()
    )
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# Miniature {family}

A `{config["architectures"][0]}` of {training["parameters"] / 1e6:.2f} M parameters that reads synthetic documents: the
same classes, file formats and code path as a 7B model, small enough to run anywhere. It is not a general model: it
knows lower-case letters and digits, one to a 16-pixel cell, on {DIMENSIONS[family].page_size}-pixel pages.

- Language model: {text["num_hidden_layers"]} layers, {text["num_attention_heads"]} query heads,
  {text["num_key_value_heads"]} key/value heads, hidden size {text["hidden_size"]}.
- Two questions: "Provide all the OCR results of this image." and "What is the <field>?".
- Training: `sparsemm miniatures train --family {family} --seed {training["seed"]} --threads {threads}` from nothing,
  {state}: {training["steps"]} steps, {training["minutes"]} minutes of processor time. The weights are the running mean.
- Steps of each stage, with the accuracy on held-out pages that ended it: {stages}.

Held-out pages (fonts and words of no training page), {reading["pages_each"]} for each number of words; greedy, bfloat16
weights run in float32:

{_table(reading)}
"""

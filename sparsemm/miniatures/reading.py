"""How well a miniature reads held-out pages, by task and number of words: `python -m sparsemm.miniatures.reading`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from sparsemm.documents import Page, make_page
from sparsemm.io import write_json_atomic
from sparsemm.runs.metrics import mean_metrics

logger = logging.getLogger(__name__)

SEED = 2024
WORDS = {"read": (1, 2, 3, 4, 6, 8, 12, 16), "field": (2, 3, 4, 5, 6)}
REQUIRED = (1, 2, 3, 4)
"""The "read" pages that the summary's required figure covers."""


@torch.no_grad()
def answers(model: Any, processor: Any, pages: list[Page], *, batch_size: int = 25) -> list[str]:
    """Greedy answers to the pages' questions, by the stock `generate`."""
    texts: list[str] = []
    for start in range(0, len(pages), batch_size):
        chunk = pages[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": page.prompt}]}],
                add_generation_prompt=True,
            )
            for page in chunk
        ]
        inputs = processor(images=[page.image for page in chunk], text=prompts, return_tensors="pt", padding=True).to(
            model.device
        )
        longest = max(len(page.answer) for page in chunk) + 8
        output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def read_pages(folder: str | Path, *, pages: int = 50, split: str = "heldout", seed: int = SEED) -> dict[str, Any]:
    """Accuracy, exact match and ANLS of a checkpoint on `pages` pages for each task and number of words."""
    from tqdm import tqdm

    from sparsemm.models import load_model

    model, processor = load_model(folder)
    groups = [(task, words) for task, numbers in WORDS.items() for words in numbers]
    tasks: dict[str, dict[str, Any]] = {task: {} for task in WORDS}
    for task, words in tqdm(groups, desc=Path(folder).name, unit="group"):
        chosen = [make_page(i, split=split, task=task, num_words=words, seed=seed) for i in range(pages)]
        texts = answers(model, processor, chosen)
        scores = mean_metrics(texts, [page.answer for page in chosen])
        row = {"pages": pages} | {name: round(value, 4) for name, value in scores.items()}
        row["answer_characters"] = round(sum(len(page.answer) for page in chosen) / pages, 1)
        tasks[task][str(words)] = row
    required = sum(tasks["read"][str(words)]["accuracy"] for words in REQUIRED) / len(REQUIRED)
    forms = sum(row["accuracy"] for row in tasks["field"].values()) / len(tasks["field"])
    summary = {"read_1_to_4_words_accuracy": round(required, 4), "field_accuracy": round(forms, 4)}
    return {"split": split, "seed": seed, "pages_each": pages, "summary": summary, "tasks": tasks}


def main() -> None:
    """Command line of `read_pages`."""
    parser = argparse.ArgumentParser(description="Measure how well a miniature reads held-out pages.")
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--pages", type=int, default=50, help="pages for each number of words")
    parser.add_argument("--split", default="heldout", choices=("train", "heldout"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path, help="JSON file (default: <folder>/reading.json)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reading = read_pages(arguments.folder, pages=arguments.pages, split=arguments.split, seed=arguments.seed)
    output = arguments.output or arguments.folder / "reading.json"
    write_json_atomic(output, reading)
    logger.info("%s -> %s", reading["summary"], output)


if __name__ == "__main__":
    main()

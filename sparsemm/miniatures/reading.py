"""How well a miniature reads held-out pages, by task and number of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemm.decoding.generation import generate_greedy
from sparsemm.documents import Page, make_page, room_for_answers
from sparsemm.models import family_of, load_model
from sparsemm.runs.metrics import mean_metrics

SEED = 2024
WORDS = {"read": (1, 2, 3, 4, 6, 8, 12, 16), "field": (2, 3, 4, 5, 6)}
MORE_WORDS = {"read": (24, 32), "field": (8, 12)}
REQUIRED = (1, 2, 3, 4)
"""The "read" pages that the summary's required figure covers."""


def answers(model: Any, processor: Any, pages: list[Page], *, batch_size: int = 25) -> list[str]:
    """Greedy answers to the pages' questions."""
    family = family_of(model)
    texts: list[str] = []
    for start in range(0, len(pages), batch_size):
        chunk = pages[start : start + batch_size]
        images, prompts = [page.image for page in chunk], [page.prompt for page in chunk]
        inputs = family.build_inputs(processor, images, prompts, model.device)
        tokens, _ = generate_greedy(model, inputs, room_for_answers(chunk))
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


def read_pages(
    folder: str | Path, *, pages: int = 50, size: int = 224, split: str = "heldout", seed: int = SEED
) -> dict[str, Any]:
    """Accuracy, exact match and ANLS of a checkpoint on `pages` pages for each task and number of words.

    Pages are `size` pixels square; those of more than 224 are also asked to hold `MORE_WORDS`.
    """
    from tqdm import tqdm

    model, processor = load_model(folder)
    groups = [(task, words) for task, numbers in WORDS.items() for words in numbers]
    groups += [(task, words) for task, numbers in MORE_WORDS.items() for words in numbers if size > 224]
    tasks: dict[str, dict[str, Any]] = {task: {} for task in WORDS}
    for task, words in tqdm(groups, desc=Path(folder).name, unit="group"):
        chosen = [make_page(i, split=split, task=task, num_words=words, seed=seed, size=size) for i in range(pages)]
        texts = answers(model, processor, chosen)
        scores = mean_metrics(texts, [page.answer for page in chosen])
        row = {"pages": pages} | {name: round(value, 4) for name, value in scores.items()}
        row["answer_characters"] = round(sum(len(page.answer) for page in chosen) / pages, 1)
        tasks[task][str(words)] = row
    required = sum(tasks["read"][str(words)]["accuracy"] for words in REQUIRED) / len(REQUIRED)
    forms = sum(row["accuracy"] for row in tasks["field"].values()) / len(tasks["field"])
    summary = {"read_1_to_4_words_accuracy": round(required, 4), "field_accuracy": round(forms, 4)}
    return {"split": split, "seed": seed, "page_size": size, "pages_each": pages, "summary": summary, "tasks": tasks}

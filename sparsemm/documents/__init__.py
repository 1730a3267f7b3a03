"""Synthetic documents: seeded page images with their words, boxes, a question and its answer."""

from sparsemm.documents.layout import LABELS, READ_PROMPT, TASKS, field_prompt
from sparsemm.documents.pages import Page, TextBox, make_page, room_for_answers
from sparsemm.documents.words import ALPHABET, SPLITS, split_of

__all__ = [
    "ALPHABET", "LABELS", "Page", "READ_PROMPT", "SPLITS", "TASKS", "TextBox", "field_prompt", "make_page",
    "room_for_answers", "split_of",
]  # fmt: skip

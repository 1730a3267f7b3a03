"""Where words stand on a page: a grid of cells with at most one character each, and the question asked about it.

One cell is one image token of the miniatures, so a layout is also the page as a perfect vision tower would see it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm.documents.words import SPLITS, draw_word
from sparsemm.errors import DataError

READ_PROMPT = "Provide all the OCR results of this image."
TASKS = ("read", "field")
LABELS = tuple("date total name order phone city item price tax code due ref room seat bank plate".split())
"""Field names of the forms; the questions, unlike the values, are the same in both splits."""


@dataclass(frozen=True)
class PlacedWord:
    """A word whose character i stands in cell (`row`, `column` + i)."""

    text: str
    row: int
    column: int


@dataclass(frozen=True)
class Layout:
    """Words in reading order on a `rows` x `columns` grid, with a question and its answer."""

    words: tuple[PlacedWord, ...]
    rows: int
    columns: int
    prompt: str
    answer: str
    task: str
    num_words: int

    def cells(self) -> list[list[str]]:
        """The grid, `[rows][columns]`: one character, or "" where the page is blank."""
        grid = [[""] * self.columns for _ in range(self.rows)]
        for word in self.words:
            grid[word.row][word.column : word.column + len(word.text)] = list(word.text)
        return grid


def field_prompt(label: str) -> str:
    """The question that asks a form for the value of `label`."""
    return f"What is the {label}?"


def _scattered(rng: np.random.Generator, texts: list[str], rows: int, columns: int) -> list[PlacedWord]:
    """Words at random places, a blank cell at least between two of a row; what finds no place is left out."""
    taken = np.zeros((rows, columns + 2), dtype=bool)
    placed = []
    for text in texts:
        for _ in range(40):
            row, column = int(rng.integers(rows)), int(rng.integers(columns - len(text) + 1))
            if not taken[row, column : column + len(text) + 2].any():
                taken[row, column + 1 : column + 1 + len(text)] = True
                placed.append(PlacedWord(text, row, column))
                break
    return sorted(placed, key=lambda word: (word.row, word.column))


def _paragraph(rng: np.random.Generator, texts: list[str], rows: int, columns: int) -> list[PlacedWord]:
    """Words in lines with one blank between them, from a random corner; what does not fit is left out."""
    margin = int(rng.integers(max(1, columns - 7 + 1)) if len(texts) < 4 else rng.integers(min(3, columns - 7) + 1))
    step = int(rng.integers(1, 3))
    break_chance = rng.choice([0.0, 0.3])
    needed = (sum(map(len, texts)) + len(texts)) // max(1, columns - margin) + 1
    row, column = int(rng.integers(max(1, rows - needed * step))), margin
    placed = []
    for text in texts:
        wraps = column + len(text) > columns
        if wraps or (column > margin and rng.random() < break_chance):
            row, column = row + step, margin
        if row >= rows:
            break
        placed.append(PlacedWord(text, row, column))
        column += len(text) + 1
    return placed


def _read(rng: np.random.Generator, split: str, num_words: int, rows: int, columns: int) -> Layout:
    longest = min(7, columns)
    while True:
        texts = [draw_word(rng, split, max_length=longest) for _ in range(num_words)]
        place = _scattered if rng.random() < 0.5 else _paragraph
        words = place(rng, texts, rows, columns)
        if len(words) == num_words:
            break
        # A grid this full rarely takes long words: shorten them rather than try for ever.
        longest = max(3, longest - 1)
    answer = " ".join(word.text for word in words)
    return Layout(tuple(words), rows, columns, READ_PROMPT, answer, "read", num_words)


def _field(rng: np.random.Generator, split: str, num_words: int, rows: int, columns: int) -> Layout:
    labels = [LABELS[i] for i in rng.permutation(len(LABELS))[:num_words]]
    longest = max(map(len, labels))
    aligned = rng.random() < 0.5
    max_value = min(6, columns - longest - 2)
    margin = int(rng.integers(columns - longest - 2 - max_value + 1))
    step = int(rng.integers(1, max(1, rows // num_words) + 1))
    row = int(rng.integers(max(1, rows - (num_words - 1) * step)))
    words, values = [], []
    for label in labels:
        value = draw_word(rng, split, min_length=min(2, max_value), max_length=max_value)
        column = margin + (longest if aligned else len(label)) + 2
        words += [PlacedWord(label + ":", row, margin), PlacedWord(value, row, column)]
        values.append(value)
        row += step
    asked = int(rng.integers(num_words))
    prompt = field_prompt(labels[asked])
    return Layout(tuple(words), rows, columns, prompt, values[asked], "field", num_words)


def max_words(task: str, rows: int, columns: int) -> int:
    """The most words (`read`) or fields (`field`) that a page of this grid is asked to hold."""
    return max(1, rows * columns // 8) if task == "read" else min(rows, len(LABELS))


def make_layout(
    rng: np.random.Generator, *, split: str, task: str, num_words: int, rows: int = 14, columns: int = 14
) -> Layout:
    """A random page of `task`: "read" (`num_words` words) or "field" (a form of `num_words` label and value lines).

    Raises `DataError` for an unknown task or split, or for more words than the grid holds.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    if min(rows, columns) < 3 or (task == "field" and columns < 9):
        raise DataError(f"a grid of {rows} x {columns} cells is too small for task {task!r}; use a larger page")
    most = max_words(task, rows, columns)
    if not 1 <= num_words <= most:
        raise DataError(f"num_words={num_words} is out of range; a {rows} x {columns} grid takes 1 to {most} ({task})")
    return (_read if task == "read" else _field)(rng, split, num_words, rows, columns)

"""Pages with a question and its answer, to calibrate on: a folder, or a Hugging Face data set."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.datasets.base import image_path
from sparsemm.datasets.hub import IMAGE_COLUMN, image_source, open_rows
from sparsemm.errors import DataError
from sparsemm.models.images import open_image

if TYPE_CHECKING:
    import PIL.Image

QUESTIONS_FILE = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """A picture and what is asked about it.

    Attributes:
        source: Path, or the bytes of an image file; opened when `image` is asked for.
        prompt: The question.
        answer: What a right answer says, or None where nobody has said it.
        task: Kind of question; kinds weigh alike in a calibration.
    """

    source: Path | bytes
    prompt: str
    answer: str | None
    task: str = "question"

    @property
    def image(self) -> PIL.Image.Image:
        """The picture in RGB. Raises `DataError` when it is missing or broken."""
        return open_image(self.source)


def open_questions(
    source: str | os.PathLike[str], *, split: str = "train", limit: int | None = None
) -> Iterable[Question]:
    """Questions of a data set, in its order.

    Args:
        source: A folder with `questions.jsonl`, or that file: a line each of `{"image": "1.png", "question": "…",
            "answer": "…", "task": "…"}`, of which `answer` and `task` may be missing; images lie beside the file. Or a
            hub id, or a folder or parquet file of a Hugging Face data set with the columns `image`, `question` and, if
            it has them, `answer` or `answers` (the first one counts) and `task`.
        split: Of a Hugging Face data set.
        limit: At most so many.

    Raises:
        DataError: There is no such data set, or it has another form.
    """
    path = Path(source)
    file = path / QUESTIONS_FILE if path.is_dir() else path
    if file.is_file() and file.suffix == ".jsonl":
        return _read_file(file)[:limit]
    rows, _ = open_rows(source, split, {IMAGE_COLUMN, "question"})
    return _read_rows(rows, limit, str(source))


def _read_file(file: Path) -> list[Question]:
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f"{where} has no 'image' and 'question'")
        questions.append(_question(image_path(file.parent, entry["image"], where), entry, where))
    return questions


def _read_rows(rows: Any, limit: int | None, source: str) -> Iterator[Question]:
    for index, row in enumerate(itertools.islice(rows, limit)):
        yield _question(image_source(row), row, f"{source}, row {index}")


def _question(image: Path | bytes, entry: dict[str, Any], where: str) -> Question:
    answer = entry.get("answer", entry.get("answers"))
    if isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else None
    question, task = entry.get("question"), entry.get("task") or "question"
    for name, value in (("question", question), ("answer", answer or ""), ("task", task)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r}, not a text")
    return Question(image, question, answer, task)

"""Questions of a folder and of a Hugging Face data set."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sparsemm.datasets import open_questions
from sparsemm.errors import DataError


def folder(path: Path, *entries: object) -> Path:
    Image.new("RGB", (6, 4), "red").save(path / "1.png")
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return path


def test_a_folder(tmp_path: Path) -> None:
    first = {"image": "1.png", "question": "Who?", "answer": ["me", "I"], "task": "field"}
    source = folder(tmp_path, first, {"image": "1.png", "question": "What?"}, {"image": "2.png", "question": "Where?"})
    questions = list(open_questions(source))
    assert [(each.prompt, each.answer, each.task) for each in questions] == [
        ("Who?", "me", "field"),
        ("What?", None, "question"),
        ("Where?", None, "question"),
    ]
    assert questions[0].image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match="2.png does not exist"):
        _ = questions[2].image
    assert len(open_questions(source / "questions.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "Who?"}, "line 1 has no 'image'"),
        ({"image": "1.png"}, "question is None"),
        ({"image": "1.png", "question": "Who?", "answer": 3}, "answer is 3"),
        ({"image": "../1.png", "question": "Who?"}, "outside"),
        ([], "line 1 has no 'image'"),
    ],
)
def test_entries_that_are_no_questions(entry: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_questions(folder(tmp_path, entry))


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), "blue").save(buffer, "PNG")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 3, "question": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    found = list(open_questions(tmp_path / "data.parquet", limit=2))
    assert [(each.prompt, each.answer) for each in found] == [("a", None), ("b", None)]
    assert found[0].image.getpixel((0, 0)) == (0, 0, 255)
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no column image"):
        open_questions(tmp_path / "none.parquet")

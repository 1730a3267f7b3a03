"""`sparsemm data show`, and PDF files as data sets of `data` and `chase`: every option, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pdf import Sheet, square_font, text, write

pytest.importorskip("pypdfium2")

from sparsemm.cli.common import checkout  # noqa: E402
from sparsemm.datasets import open_pages  # noqa: E402

MINIATURE = checkout() / "assets" / "miniatures" / "llava-vicuna"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pages of two lines, one of which is blank but for a number."""
    sheets = [
        Sheet(text(f"upper {number} here", 20, 260) + text(f"lower {number} there", 20, 30), width=200, height=300)
        for number in (1, 2)
    ]
    return write(
        tmp_path_factory.mktemp("book") / "book.pdf", *sheets, Sheet(text("3", 90, 150), width=200, height=300)
    )


def boxes(folder: Path) -> list[list[str]]:
    """The texts of each page of a data set in our own format."""
    return [[word.text for word in page.words] for page in open_pages(folder)]


FIRST = ["upper", "1", "here", "lower", "1", "there"]
SECOND = ["upper", "2", "here", "lower", "2", "there"]
OPTIONS: list[tuple[list[str], list[list[str]]]] = [
    ([], [FIRST, SECOND, ["3"]]),
    (["--format", "pdf"], [FIRST, SECOND, ["3"]]),
    (["--page-range", "2-"], [SECOND, ["3"]]),
    (["--page-range", "3,1"], [FIRST, ["3"]]),
    (["--fewest-words", "2"], [FIRST, SECOND]),
    (["--unit", "line"], [["upper 1 here", "lower 1 there"], ["upper 2 here", "lower 2 there"], ["3"]]),
    (["--unit", "character", "--page-range", "3"], [["3"]]),
    (["--crops", "halves", "--page-range", "1"], [FIRST[:3], FIRST[3:]]),
    (["--crops", "quarters", "--page-range", "1", "--unit", "character"], [[*"upper1here"], [*"lower1there"]]),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS)
def test_options_choose_what_is_converted(
    run: Any, book: Path, tmp_path: Path, options: list[str], expected: list[list[str]]
) -> None:
    outcome = run("data", "convert", book, "out", *options, "--no-progress")
    assert outcome.status == 0, outcome.err
    assert boxes(tmp_path / "out") == expected
    assert outcome.out.startswith(f"out: {len(expected)} pages")


@pytest.mark.parametrize("form", ["synthdog", "plain", "mlt", "ctw", "coco", "pdf"])
def test_pages_of_a_pdf_are_written_in_any_format(run: Any, book: Path, tmp_path: Path, form: str) -> None:
    outcome = run("data", "convert", book, "out", "--to", form, "--fewest-words", 2, "--no-progress")
    assert outcome.status == 0 and outcome.out == "out: 2 pages, 1 left out\n"
    assert boxes(tmp_path / "out") == [FIRST, SECOND]


@pytest.mark.parametrize(("options", "expected"), OPTIONS)
def test_options_choose_what_is_chased(
    run: Any, files: dict[str, Path], book: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    expected: list[list[str]],
) -> None:  # fmt: skip
    chased: dict[str, Any] = {}
    monkeypatch.setattr("sparsemm.cli.chase.run_chase", lambda *given, **named: chased.update(named, pages=given[3]))
    outcome = run("chase", "--model", files["model"], "--dataset", book, "--output", "scores.json", *options)
    assert outcome.status == 0, outcome.err
    found = []
    for page in chased["pages"]:
        try:
            found.append([word.text for word in page.words])
        except Exception as error:
            assert "text boxes, not" in str(error)
    assert found == expected
    described = chased["dataset"].split(", ")
    assert described[0] == "book.pdf" and len(described) == 1 + sum(
        option.startswith("--") and option != "--format" for option in options
    )


def test_pictures_are_as_large_as_the_model_takes_or_as_is_said(
    run: Any, files: dict[str, Path], book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr("sparsemm.cli.chase.run_chase", lambda *given, **named: sizes.append(given[3][0].image.size))
    monkeypatch.setattr("sparsemm.models.qwen2_vl.Qwen2VL.largest_picture", lambda *given: 15_000)
    for options in ([], ["--pdf-pixels", "60000"]):
        assert not run("chase", "--model", files["model"], "--dataset", book, "--output", "s.json", *options).status
    assert not run("data", "show", book, "shown.png", "--pdf-pixels", "240000").status
    sizes.append(Image.open(tmp_path / "shown.png").size)
    assert sizes == [(100, 150), (200, 300), (400, 600)]


def test_boxes_are_shown_on_the_page(run: Any, book: Path, tmp_path: Path) -> None:
    outcome = run("data", "show", book, "shown.png", "--image", 2, "--pdf-pixels", 60_000)
    assert outcome.status == 0
    assert outcome.out.splitlines() == ["shown.png: 6 text boxes on 200 x 300 pixels", " ".join(SECOND)]
    page = list(open_pages(book, max_pixels=60_000))[1]
    plain, shown = np.asarray(page.image).astype(int), np.asarray(Image.open(tmp_path / "shown.png")).astype(int)
    frames = np.zeros(plain.shape[:2], dtype=bool)
    for word in page.words:
        x0, y0, x1, y1 = map(int, word.box)
        frames[y0 - 1 : y1 + 2, x0 - 1 : x1 + 2] = True
    for word in page.words:
        x0, y0, x1, y1 = map(int, word.box)
        frames[y0 : y1 + 1, x0 : x1 + 1] = False
    changed = (plain != shown).any(-1)
    assert changed[frames].all() and not changed[~frames].any()
    assert run("data", "show", "miniature", "page.png", "--seed", 3).status == 0
    assert Image.open(tmp_path / "page.png").size == (224, 224)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", 9], "holds fewer than 9 images"),
        (["--page-range", "7"], "has no page 7"),
        (["--page-range", "3-1"], "page range '3-1' is not like 1-3,8,20-"),
        (["--fewest-words", 9], "page 1 holds 6 text boxes, not 9"),
        (["--fonts", "train"], "no option fonts"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    run: Any, book: Path, tmp_path: Path, options: list, said: str
) -> None:
    outcome = run("data", "show", book, "shown.png", *options)
    assert outcome.status == 2 and outcome.err.splitlines()[-1].startswith("error: ") and said in outcome.err
    assert not (tmp_path / "shown.png").exists()


def test_a_model_that_cannot_read_leaves_no_scores(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    """The toy says nothing that stands on a page of Chinese."""
    font = square_font({"a": "4E2D", "b": "6587"})
    write(tmp_path / "a.pdf", *[Sheet(text("abab", 20, 150, font="F2"))] * 2, font=font)
    options = ["--model", files["model"], "--dataset", "a.pdf", "--output", "scores.json", "--max-new-tokens", 4]
    outcome = run("chase", *options, "--no-progress")
    assert outcome.status == 2 and "it cannot read them" in outcome.err.splitlines()[-1]
    assert "--least-read" in outcome.err.splitlines()[-1] and not (tmp_path / "scores.json").exists()


@pytest.mark.skipif(not (MINIATURE / "model.safetensors").is_file(), reason="the miniature is not in the checkout")
def test_a_miniature_is_chased_on_its_own_pdf(run: Any, tmp_path: Path) -> None:
    """The three commands of head_scores/README.md."""
    assert not run("data", "convert", "miniature", "pages", "--to", "pdf", "--num-images", 3, "--no-progress").status
    assert "text boxes on" in run("data", "show", "pages/pages.pdf", "boxes.png", "--image", 2).out
    options = ["--model", "llava-vicuna", "--dataset", "pages/pages.pdf"]
    outcome = run("chase", *options, "--output", "scores.json")
    assert outcome.status == 0 and "3 images read, 0 skipped" in outcome.out and "ended at" not in outcome.out
    cut = run("chase", *options, "--output", "cut.json", "--max-new-tokens", 2)
    assert "3 readings ended at the last of their tokens (--max-new-tokens)" in cut.out
    provenance = json.loads((tmp_path / "scores.json").read_text())["provenance"]
    assert provenance["dataset"] == "pages.pdf" and provenance["num_hits"] > 0

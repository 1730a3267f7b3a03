"""PDF files as data sets: which pages, in which form, and what happens to those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pdf import Sheet, text, write

pytest.importorskip("pypdfium2")

from sparsemm.datasets import BoxedImage, PdfPages, convert, draw_boxes, open_pages  # noqa: E402
from sparsemm.datasets.pdf import DEFAULT_PIXELS  # noqa: E402
from sparsemm.documents.pages import TextBox  # noqa: E402
from sparsemm.errors import DataError  # noqa: E402


def numbered(path: Path, count: int) -> Path:
    return write(path, *(Sheet(text(f"page {number}", 20, 150)) for number in range(1, count + 1)))


def last_words(pages) -> list[str]:
    return [page.words[-1].text for page in pages]


def test_files_folders_and_ranges(tmp_path):
    numbered(tmp_path / "b.pdf", 3)
    numbered(tmp_path / "a.pdf", 2)
    pages = open_pages(tmp_path / "b.pdf")
    assert isinstance(pages, PdfPages) and last_words(pages) == ["1", "2", "3"]
    assert [page.name for page in open_pages(tmp_path)] == [
        *("a.pdf, page 1", "a.pdf, page 2", "b.pdf, page 1", "b.pdf, page 2", "b.pdf, page 3")
    ]
    assert last_words(open_pages(tmp_path, page_range="2-")) == ["2", "2", "3"]
    assert last_words(open_pages(tmp_path / "b.pdf", page_range=" 3, 1-1")) == ["1", "3"]
    assert last_words(open_pages(tmp_path / "b.pdf", limit=2)) == ["1", "2"]
    (tmp_path / "scans").mkdir()
    numbered(tmp_path / "scans" / "SCAN.PDF", 1)
    assert (
        last_words(open_pages(tmp_path / "scans")) == last_words(open_pages(tmp_path / "scans" / "SCAN.PDF")) == ["1"]
    )
    with pytest.raises(IndexError):
        _ = pages[3]


@pytest.mark.parametrize("given", ["0", "3-2", "one", "", "1-2-3", "-4"])
def test_bad_ranges_are_named(tmp_path, given):
    if given == "":
        given = ","
    with pytest.raises(DataError, match="is not like"):
        open_pages(numbered(tmp_path / "a.pdf", 2), page_range=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "thirds"}, "thirds"),
        ({"unit": "page"}, "'page'"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"fewest_words": 0}, "fewest_words=0"),
        ({"page_range": "7-"}, "no page 7-"),
        ({"fonts": "train"}, "no option fonts"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_pages(numbered(tmp_path / "a.pdf", 2), **options)


def test_crops_are_images_of_their_own(tmp_path):
    path = write(tmp_path / "a.pdf", Sheet(text("above", 20, 180) + text("below", 20, 20), width=200, height=300))
    halves = open_pages(path, crops="halves")
    assert [page.name[-6:] for page in halves] == ["crop 1", "crop 2"]
    upper, lower = halves
    assert lower.words[0].text == "below" and upper.words[0].text == "above"
    assert len(open_pages(path, crops="quarters", limit=3)) == 3
    small, large = open_pages(path), open_pages(path).at_most(10_000)
    assert small[0].image.size > large[0].image.size and small.max_pixels == DEFAULT_PIXELS


def test_pages_that_cannot_be_read_say_why(tmp_path):
    blank = write(tmp_path / "scan.pdf", Sheet("0 0 90 90 re f"), Sheet(text("two words", 20, 150)))
    (tmp_path / "torn.pdf").write_bytes(b"%PDF-1.5 torn")
    first, second, torn = open_pages(tmp_path)
    with pytest.raises(DataError, match=r"scan.pdf, page 1 holds 0 text boxes"):
        _ = first.words
    assert [word.text for word in second.words] == ["two", "words"]
    with pytest.raises(DataError, match="torn.pdf"):
        _ = torn.words
    with pytest.raises(DataError, match="holds 2 text boxes, not 3"):
        _ = open_pages(blank, fewest_words=3)[1].words
    with pytest.raises(DataError, match="torn.pdf"):
        open_pages(tmp_path / "torn.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no PDF file"):
        open_pages(tmp_path / "empty", format="pdf")
    assert convert(open_pages(tmp_path), tmp_path / "out", "plain", progress=False)[:2] == (1, 2)


def test_no_page_of_a_list_keeps_its_picture(tmp_path):
    (page,) = pages = list(open_pages(numbered(tmp_path / "a.pdf", 1)))
    size = page.image.size
    assert size[0] * size[1] > 100_000 and pages[0].words
    kept = [value for value in vars(page).values() if isinstance(value, (Image.Image, np.ndarray, bytes))]
    assert kept == []


def test_generators_come_back_from_their_own_pdf(tmp_path):
    """Pictures and boxes of a PDF written from pages are those of the pages."""
    for name, options in (("miniature", {}), ("documents", {"size": (400, 500)})):
        pages = list(open_pages(name, limit=3, **options))
        assert convert(pages, tmp_path / name, "pdf", progress=False) == (3, 0, {})
        read = open_pages(tmp_path / name, unit="line")
        assert len(read) == 3
        for before, after in zip(pages, read, strict=True):
            image = after.image
            assert np.array_equal(np.asarray(image), np.asarray(before.image))
            assert list(after.words) == list(before.words)


def test_any_text_survives_in_a_pdf(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 900, 3), dtype=np.uint8))
    alphabet = "".join(map(chr, [*range(0x21, 0x7F), *range(0x400, 0x4FF), 0x1F600, 0x4E2D, 0xE9]))
    lines = [alphabet[start : start + 40] for start in range(0, len(alphabet), 40)]
    words = [TextBox(line, (10.0, 20.0 * row, 889.0, 20.0 * row + 14)) for row, line in enumerate(lines)]
    convert([BoxedImage("a", noise, words)], tmp_path / "out", "pdf", progress=False)
    (page,) = open_pages(tmp_path / "out" / "pages.pdf", unit="line")
    assert list(page.words) == words


def test_boxes_are_drawn_around_words(tmp_path):
    page = open_pages(numbered(tmp_path / "a.pdf", 1))[0]
    before = np.asarray(page.image)
    drawn, words, flaws = draw_boxes(page)
    changed = (np.asarray(drawn) != before).any(-1)
    assert [word.text for word in words] == ["page", "1"] and not flaws
    x0, y0, x1, y1 = map(int, words[0].box)
    assert changed[y0 - 1, x0 - 1 : x1 + 2].all() and changed[y0 - 1 : y1 + 2, x1 + 1].all()
    assert not changed[y0 : y1 + 1, x0 : x1 + 1].any()

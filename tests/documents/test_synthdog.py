"""Full-size pages: the same page every time, and boxes that hold the ink."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sparsemm.documents.fonts import font_paths
from sparsemm.documents.photo import homography, lay_on, place_corners, project
from sparsemm.documents.synthdog import boxes_on_page, lay_out, make_document, paint
from sparsemm.errors import DataError


def fonts() -> list[str]:
    return [str(path) for path in font_paths("train")]


def test_the_same_arguments_give_the_same_page():
    first, again, other = (make_document(index, size=(300, 400), seed=1) for index in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes() and first.words == again.words
    assert first.image.tobytes() != other.image.tobytes()
    assert make_document(3, size=(300, 400), seed=2).words != first.words


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (1200, 200), (150, 900), (960, 1280)])
def test_any_resolution_holds_text_inside_the_page(size):
    documents = [make_document(index, size=size) for index in range(2)]
    for document in documents:
        assert document.image.size == size and document.image.mode == "RGB"
        for word in (*document.words, *document.lines):
            x0, y0, x1, y1 = word.box
            assert 0 <= x0 <= x1 <= size[0] - 1 and 0 <= y0 <= y1 <= size[1] - 1
    assert any(document.words for document in documents)


def test_boxes_hold_the_ink_of_their_words_after_perspective():
    """Each word is drawn alone on a tilted black sheet: where it shines through is where its box must be."""
    rng = np.random.default_rng(0)
    sheet, page = (340, 420), (400, 500)
    spans = lay_out(rng, sheet, fonts())
    corners = place_corners(rng, sheet, page, 1.0)
    flat = np.array([[0, 0], [sheet[0], 0], list(sheet), [0, sheet[1]]], dtype=float)
    matrix = homography(flat, corners)
    assert np.allclose(project(flat, matrix), corners)
    for span in spans[:: max(1, len(spans) // 12)]:
        paper = Image.new("RGB", sheet)
        paint(paper, [span], (255, 255, 255))
        shown = np.asarray(lay_on(Image.new("RGB", page), paper, corners, shadow=0.0)).max(-1)
        ys, xs = np.nonzero(shown > 60)
        ((word,), (line,)) = boxes_on_page([span], matrix, page)
        assert word == line and word.text == span.text
        found = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        inside = np.array(word.box) - found
        assert (inside[:2] <= 1.5).all() and (inside[2:] >= -1.5).all(), (span.text, word.box, found)
        # A slanted word's box is larger than its ink, by what the slant adds and little more.
        slack = 4 + 0.15 * (found[2] - found[0])
        assert (np.abs(inside) <= slack).all(), (span.text, word.box, found)


def test_lines_hold_their_words_in_order():
    document = make_document(1, size=(500, 600), seed=3)
    assert " ".join(line.text for line in document.lines) == " ".join(word.text for word in document.words)
    words = iter(document.words)
    for line in document.lines:
        for text in line.text.split(" "):
            word = next(words)
            assert word.text == text
            assert line.box[0] <= word.box[0] and line.box[3] >= word.box[3]


def test_pages_differ_in_fonts_columns_and_backgrounds():
    rng = np.random.default_rng(1)
    layouts = [lay_out(rng, (900, 1200), fonts()) for _ in range(12)]
    assert len({span.font for spans in layouts for span in spans}) > 8
    assert len({span.size for spans in layouts for span in spans}) > 8
    lefts = [
        len({span.x for span in spans if span.x == min(s.x for s in spans if s.line == span.line)}) for spans in layouts
    ]
    assert max(lefts) > 1
    corners = [make_document(index, size=(96, 96)).image.getpixel((0, 0)) for index in range(6)]
    assert len(set(corners)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (63, 400)}, "too small"),
        ({"index": -1}, "negative"),
        ({"strength": 1.5}, "strength"),
        ({"fonts": "comic"}, "comic"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        make_document(**{"index": 0, **arguments})

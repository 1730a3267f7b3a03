"""Synthetic documents: reproducible pages, disjoint splits, boxes that hold the ink."""

from __future__ import annotations

import numpy as np
import pytest

from sparsemm.documents import ALPHABET, LABELS, READ_PROMPT, make_page, split_of
from sparsemm.documents.fonts import font_paths
from sparsemm.documents.layout import make_layout
from sparsemm.documents.pages import page_layout
from sparsemm.documents.render import CELL, render
from sparsemm.errors import DataError


@pytest.mark.parametrize("task", ["read", "field"])
def test_same_arguments_give_the_same_page(task):
    first = make_page(3, split="heldout", task=task, seed=5)
    make_page(4, split="heldout", task=task, seed=5)  # random access: other pages in between change nothing
    again = make_page(3, split="heldout", task=task, seed=5)
    assert (first.words, first.prompt, first.answer) == (again.words, again.prompt, again.answer)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))


@pytest.mark.parametrize("change", [{"seed": 6}, {"split": "train"}, {"task": "field"}, {"num_words": 3}])
def test_every_argument_changes_the_page(change):
    base = {"split": "heldout", "task": "read", "num_words": 2, "seed": 5}
    first, second = make_page(0, **base), make_page(0, **{**base, **change})
    assert not np.array_equal(np.asarray(first.image), np.asarray(second.image))


def test_pages_differ_from_one_another():
    answers = {make_page(i, split="heldout", num_words=4).answer for i in range(30)}
    assert len(answers) == 30


def test_splits_share_no_word_and_no_typeface():
    rng = np.random.default_rng(0)
    words = {
        split: {word.text for _ in range(60) for word in make_layout(rng, split=split, task="read", num_words=8).words}
        for split in ("train", "heldout")
    }
    assert len(words["train"]) > 300 and len(words["heldout"]) > 200
    assert not words["train"] & words["heldout"]
    assert all(split_of(word) == split for split, group in words.items() for word in group)
    files = {split: {path.name for path in font_paths(split)} for split in ("train", "heldout")}
    packages = {split: {path.parts[-3:-1] for path in font_paths(split)} for split in ("train", "heldout")}
    assert files["train"] and files["heldout"]
    assert not files["train"] & files["heldout"]
    assert not packages["train"] & packages["heldout"]


@pytest.mark.parametrize(("split", "task"), [("heldout", "read"), ("heldout", "field"), ("train", "read")])
def test_boxes_enclose_the_ink_and_nothing_else_does(split, task):
    for index in range(6):
        layout, rng = page_layout(index, split=split, task=task, num_words=5)
        _, boxes, ink = render(layout, rng, split)
        uncovered = ink.copy()
        for word, (x0, y0, x1, y1) in zip(layout.words, boxes, strict=True):
            region = (slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1))
            assert ink[region].max() > 0.3, word
            # Tight: the box's four edges carry ink.
            assert all(
                edge.max() > 0 for edge in (ink[region][0], ink[region][-1], ink[region][:, 0], ink[region][:, -1])
            )
            # The word's cells, and no others, hold its box.
            assert int(x0) // CELL == word.column and int(x1) // CELL == word.column + len(word.text) - 1
            assert int(y0) // CELL == int(y1) // CELL == word.row
            uncovered[region] = 0
        assert uncovered.max() == 0


def test_ink_can_be_told_from_paper():
    for index in range(8):
        layout, rng = page_layout(index, split="heldout", num_words=3)
        page, _, ink = render(layout, rng, "heldout")
        assert abs(page[ink > 0.9].mean() - page[ink == 0].mean()) > 50


def test_read_pages_answer_with_the_words_in_reading_order():
    for index in range(10):
        page = make_page(index, split="heldout", num_words=6)
        assert page.prompt == READ_PROMPT
        assert page.answer == " ".join(word.text for word in page.words)
        rows = [(int(word.box[1]) // CELL, word.box[0]) for word in page.words]
        assert rows == sorted(rows)
        assert set(page.answer) <= set(ALPHABET + " ")


def test_field_pages_answer_with_the_value_beside_the_label():
    for index in range(10):
        page = make_page(index, split="heldout", task="field", num_words=4)
        texts = [word.text for word in page.words]
        label = page.prompt.removeprefix("What is the ").removesuffix("?")
        assert label in LABELS
        assert page.answer == texts[texts.index(label + ":") + 1]
        assert len(texts) == 8 and page.num_words == 4


@pytest.mark.parametrize("num_words", [1, 8, 16, 24])
def test_pages_hold_exactly_the_words_asked_for(num_words):
    for index in range(5):
        page = make_page(index, split="heldout", num_words=num_words)
        assert page.num_words == num_words == len(page.words) == len(page.answer.split())


def test_other_sizes():
    assert make_page(0, split="heldout", size=320).image.size == (320, 320)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split"),
        ({"task": "sing"}, "task"),
        ({"num_words": 0}, "num_words=0"),
        ({"num_words": 400}, "num_words=400"),
        ({"size": 100}, "size=100"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(DataError, match=message):
        make_page(0, **{"split": "heldout", **change})

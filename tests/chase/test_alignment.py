"""The aligner on readings whose every character has a known origin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import cut, owners_of, page_lines, read, score

from sparsemm.chase.alignment import align
from sparsemm.chase.matching import match_aligned

PAGES = [page_lines(index) for index in range(3)]


@pytest.mark.parametrize(
    ("kind", "least", "most_wrong"),
    [
        ("true", 1.0, 0.0),
        ("swapped", 1.0, 0.0),
        ("skipped", 0.99, 0.005),
        ("interleaved", 0.9, 0.02),
        ("misread", 0.92, 0.02),
    ],
)
def test_tokens_find_their_own_word_whatever_the_order(kind: str, least: float, most_wrong: float) -> None:
    scores = []
    for index, lines in enumerate(PAGES):
        text, owners = read(lines, kind, seed=index)
        tokens = cut(text, seed=index)
        found = match_aligned(tokens, [word for line in lines for word, _ in line])
        scores.append(score(found, owners_of(tokens, owners)))
    matched, wrong = np.mean(scores, axis=0)
    assert matched >= least and wrong <= most_wrong, (matched, wrong)


def test_lines_in_reverse_are_found() -> None:
    lines = PAGES[0]
    text, owners = read(lines[::-1], "true", seed=0)
    tokens = cut(text, seed=0)
    matched, _ = score(match_aligned(tokens, [word for line in lines for word, _ in line]), owners_of(tokens, owners))
    assert matched >= 0.85


def test_another_text_is_hardly_matched() -> None:
    for first, second in ((0, 1), (1, 2), (2, 0)):
        text, _ = read(PAGES[first], "true", seed=0)
        found = match_aligned(cut(text, seed=0), [word for line in PAGES[second] for word, _ in line])
        assert sum(one is not None for one in found) <= 0.02 * len(found)


def test_a_loop_is_no_reading() -> None:
    chunks = [word for line in PAGES[0] for word, _ in line]
    assert match_aligned(["0"] * 1024, chunks) == [None] * 1024
    assert match_aligned([" the"] * 1024, chunks).count(None) > 1000


def table(rows: int) -> list[list[tuple[str, int]]]:
    """Lines that are alike but for a word, as in a listing of files."""
    words = [["|", "|--", "sources", "version", f"{row * 37 % 101:03d}"] for row in range(rows)]
    return [[(word, 5 * row + place) for place, word in enumerate(line)] for row, line in enumerate(words)]


@pytest.mark.parametrize("kind", ["true", "swapped", "skipped"])
def test_lines_that_are_alike_find_their_own_row(kind: str) -> None:
    lines = table(40)
    text, owners = read(lines, kind, seed=0)
    tokens = cut(text, seed=0)
    matched, wrong = score(
        match_aligned(tokens, [word for line in lines for word, _ in line]), owners_of(tokens, owners)
    )
    assert matched >= 0.97 and wrong <= 0.01


def test_passages_part_where_words_begin() -> None:
    """The letter that the line left out begins with, as the next one does, belongs to the next one."""
    truth = "the first line of the page|section two is left out|section three is read".split("|")
    read, starts = truth[0] + truth[2], {0, len(truth[0]), len(truth[0] + truth[1])}
    expected = [*range(len(truth[0])), *range(len(truth[0] + truth[1]), sum(map(len, truth)))]
    assert align(read, "".join(truth), starts) == expected


def test_a_page_of_one_word_is_read() -> None:
    """What occurs everywhere is paired in order: a table of zeros is no loop."""
    assert match_aligned(["0"] * 1000, ["0"] * 1000) == [*range(1000)]
    assert match_aligned(["abc", "defg"] * 300, ["abcdefg"] * 300) == [index // 2 for index in range(600)]


def test_words_that_occur_in_both_texts_are_no_passage() -> None:
    """Runs of 8 to 15 characters stay where their neighbours are read, too, and nowhere else."""
    lines = PAGES[0]
    chunks = [word for line in lines for word, _ in line]
    middle = len(chunks) // 2
    place = next(index for index in range(middle, len(chunks)) if 9 <= len(chunks[index]) <= 13)
    stray = " ".join([*["zq", "xj"] * 30, chunks[place], *["jx", "qz"] * 30])
    assert not any(match_aligned(cut(stray, seed=0), chunks))
    around = chunks[place - 6 : place + 7]
    assert match_aligned([" " + word for word in around], chunks)[6] == place


@pytest.mark.parametrize("misread", ["generated", "truth"])
@pytest.mark.parametrize(("between", "is_one"), [(31, True), (32, False)])
def test_two_short_runs_are_a_passage_where_little_is_between_them(misread: str, between: int, is_one: bool) -> None:
    """Of twelve characters each, neither a passage by itself. All else of both texts is of other letters."""
    runs = "abcdefghijkl", "mnopqrstuvwx"
    gap = {"generated": "#", "truth": "~", misread: {"generated": "#", "truth": "~"}[misread] * between}
    generated = "#" * 300 + runs[0] + gap["generated"] + runs[1] + "#" * 300
    truth = "~" * 250 + runs[0] + gap["truth"] + runs[1] + "~" * 250
    expected: list[int | None] = [None] * len(generated)
    for run in runs if is_one else ():
        begin = generated.index(run)
        expected[begin : begin + 12] = range(truth.index(run), truth.index(run) + 12)
    assert align(generated, truth) == expected


def test_one_passage_stays_one_whatever_follows_it() -> None:
    """The text that it begins with, inside of a word, stands behind its end once more, and a word follows there."""
    truth = "alpha beta gamma delta, the second passage of a textpha rest"
    starts = {place for place in range(len(truth)) if place == 0 or truth[place - 1] == " "}
    read = truth[2 : truth.index("pha rest")]
    assert align(read, truth, starts) == [*range(2, 2 + len(read))]


@pytest.mark.parametrize(("between", "is_read"), [(199, True), (200, False)])
def test_what_lies_between_passages_is_read_where_it_is_short(between: int, is_read: bool) -> None:
    first, last = "abcdefghijklmnopqrstuvwx", "ABCDEFGHIJKLMNOPQRSTUVWX"
    generated, truth = first + ("#" * 90 + "z").ljust(between, "#") + last, f"{first}z{last}"
    expected = [*range(24), *[None] * between, *range(25, 49)]
    expected[24 + 90] = 24 if is_read else None
    assert align(generated, truth) == expected


def test_short_texts_are_aligned_as_wholes() -> None:
    assert align("abc", "abc") == [0, 1, 2]
    assert align("axc", "abc") == [0, None, 2]
    assert align("", "abc") == [] and align("abc", "") == [None] * 3


texts = st.text(alphabet="abc", max_size=60)


@settings(max_examples=200, deadline=None)
@given(texts, texts, st.sets(st.integers(0, 60)))
def test_places_hold_the_same_character_and_are_taken_once(generated: str, truth: str, starts: set[int]) -> None:
    places = [(index, place) for index, place in enumerate(align(generated, truth, starts)) if place is not None]
    assert all(generated[index] == truth[place] for index, place in places)
    assert len({place for _, place in places}) == len(places)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=16, max_size=40), st.text(min_size=16, max_size=40), texts, texts)
def test_a_passage_is_found_wherever_it_stands(first: str, second: str, before: str, after: str) -> None:
    """Runs that occur once in each text keep their order inside, whatever surrounds them."""
    truth = before + first + second + after
    if truth.count(first) > 1 or truth.count(second) > 1 or (second + first).count(first) > 1:
        return
    places = align(second + first, truth)
    if set(before + after) & set(first + second) or set(first) & set(second):
        return
    assert places == [
        *range(len(before + first), len(before + first + second)),
        *range(len(before), len(before + first)),
    ]

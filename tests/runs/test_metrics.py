"""Metrics against values worked out by hand and against a plain recursive definition."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm.runs.metrics import (
    anls,
    character_accuracy,
    clean_text,
    exact_match,
    mean_metrics,
    score_metrics,
    standard_error,
)

texts = st.text(alphabet="ab c", max_size=7)


def recursive_distance(first: str, second: str) -> int:
    @lru_cache(None)
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    return distance(len(first), len(second))


@given(texts, texts)
@settings(max_examples=300, deadline=None)
def test_character_accuracy_equals_its_definition(first: str, second: str) -> None:
    one, other = clean_text(first), clean_text(second)
    longest = max(len(one), len(other))
    expected = 1 - (recursive_distance(one, other) / longest if longest else 0.0)
    assert character_accuracy(first, second) == character_accuracy(second, first) == expected


@given(texts, texts)
@settings(max_examples=200, deadline=None)
def test_metrics_stay_between_zero_and_one(first: str, second: str) -> None:
    for value in (character_accuracy(first, second), exact_match(first, second), anls(first, second)):
        assert 0.0 <= value <= 1.0
    assert (character_accuracy(first, second) == 1.0) == (exact_match(first, second) == 1.0)


def test_character_accuracy_by_hand() -> None:
    assert character_accuracy("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert character_accuracy("", "abcd") == 0.0
    assert character_accuracy("abcdefgh", "ab") == pytest.approx(0.25)
    assert character_accuracy("", "") == 1.0
    assert character_accuracy("Ab", "ab") == 0.5


def test_white_space_is_no_difference() -> None:
    assert clean_text("  a \n b\t") == "a b"
    assert exact_match(" two  words\n", "two words") == 1.0
    assert exact_match("twowords", "two words") == 0.0


def test_anls_threshold_and_case() -> None:
    assert anls("KITTEN", "kitten") == 1.0
    assert anls("abcd", "abxd") == pytest.approx(0.75)
    assert anls("abxy", "abcd") == 0.0, "a distance of exactly the threshold scores nothing"
    assert anls("abxyz", "abcde") == 0.0
    assert anls("abcx", ["zzzz", "abcd"]) == pytest.approx(0.75), "the best reference counts"
    with pytest.raises(ValueError, match="references is empty"):
        anls("a", [])


def test_standard_error_by_hand() -> None:
    # Deviations -1, 0, 1: sample variance 1, of the mean 1/3.
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    assert standard_error([0.5]) is None and standard_error([]) is None


def test_mean_metrics() -> None:
    assert score_metrics(["ab", "ax"], ["ab", "ab"])["accuracy"] == [1.0, 0.5]
    means = mean_metrics(["ab", "ax"], ["ab", "ab"])
    assert means == {"accuracy": 0.75, "exact_match": 0.5, "anls": 0.5}
    with pytest.raises(ValueError, match="no prediction"):
        mean_metrics([], [])
    with pytest.raises(ValueError):
        mean_metrics(["a"], [])

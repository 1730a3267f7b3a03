"""Aligning two texts whose passages stand in another order, with reading errors (spec section 5, match rules)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

_SHORTEST_RUN = 8
"""Characters that two texts must have in common in a row to be looked at as the same passage; a power of 2."""

_SHORTEST_PASSAGE = 16
"""Characters of a passage, in runs one after the other: words of fewer occur in any two texts of a language."""

_LARGEST_BREAK = 32
"""Places from the end of a run to the next one of the same passage, in either text: what is between was misread."""

_MOST_PAIRS = 4096
"""What occurs in more pairs of places, such as a row of dots, is only paired in order."""

_LARGEST_GAP = 200
"""Between two passages, texts up to so long are taken for one another, with reading errors."""


def align(generated: str, truth: str, starts: Collection[int] = ()) -> list[int | None]:
    """For each character of `generated` the place in `truth` that it was read from, or None; blocks may be moved.

    Where one passage may end and the next begin at several places, they do where a word of the truth begins: `starts`.

    The longest run that both texts have in common is one passage wherever it stands, then the longest of what is left
    of them, and so on (greedy string tiling). A passage that occurs several times is thus told by what surrounds it.
    Runs too short to be no chance are dropped unless the next ones continue them; what lies between two passages is
    aligned by fewest edits with what the truth has beside them.
    """
    places: list[int | None] = [None] * len(generated)
    taken = bytearray(len(truth))
    _tile(places, taken, _common_runs(generated, truth))
    _drop_chance(places, taken)
    for start, end in _gaps([place is not None for place in places]):
        if end - start >= _LARGEST_GAP:
            continue
        beside = _beside(places, taken, start, end)
        for block in Levenshtein.opcodes(generated[start:end], "".join(truth[place] for place in beside)):
            if block.tag == "equal":
                for step in range(block.src_end - block.src_start):
                    place = beside[block.dest_start + step]
                    places[start + block.src_start + step], taken[place] = place, 1
    _move_cuts(places, taken, generated, truth, starts)
    return places


def _common_runs(generated: str, truth: str) -> list[tuple[int, int, int]]:
    """Every longest run of equal characters, at least `_SHORTEST_RUN`: its length, and where it begins in each text."""
    first, second = (len(text) - _SHORTEST_RUN + 1 for text in (generated, truth))
    if first < 1 or second < 1:
        return []
    grams = _grams(generated + truth)
    left, right = grams[:first], grams[len(generated) :]
    order = np.argsort(right, kind="stable")
    begin, end = (np.searchsorted(right[order], left, side) for side in ("left", "right"))
    alike = np.argsort(left, kind="stable")
    rank = np.empty(first, np.int64)  # how many of the same came before
    rank[alike] = np.arange(first) - np.searchsorted(left[alike], left[alike])
    is_frequent = (end - begin) * np.bincount(left)[left] > _MOST_PAIRS
    pairs = np.where(is_frequent, rank < end - begin, end - begin)
    # Each pair of places with the same characters from there on, along the diagonals of a table of all pairs.
    starts = np.repeat(np.arange(first), pairs)
    nth = np.arange(len(starts)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    targets = order[begin[starts] + np.where(is_frequent[starts], rank[starts], nth)]
    along = np.lexsort((starts, targets - starts))
    starts, targets = starts[along], targets[along]
    is_new = (np.diff(starts, prepend=-2) != 1) | (np.diff(targets, prepend=-2) != 1)
    heads = np.flatnonzero(is_new)
    lengths = np.diff(heads, append=len(starts)) + _SHORTEST_RUN - 1
    return list(zip(lengths.tolist(), starts[heads].tolist(), targets[heads].tolist(), strict=True))


def _grams(text: str) -> np.ndarray:
    """For each place a number, equal where the next `_SHORTEST_RUN` characters are."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    size = 1
    while size < _SHORTEST_RUN:
        _, codes = np.unique(codes, return_inverse=True)
        codes = codes[:-size] * len(text) + codes[size:]
        size *= 2
    return np.unique(codes, return_inverse=True)[1]


def _tile(places: list[int | None], taken: bytearray, runs: Sequence[tuple[int, int, int]]) -> None:
    """Place the runs, longest first; what others have taken is cut off of a run, the rest waits for its turn."""
    heap = [(-length, start, target) for length, start, target in runs]
    heapq.heapify(heap)
    while heap:
        negative, start, target = heapq.heappop(heap)
        used = [places[start + step] is not None or taken[target + step] for step in range(-negative)]
        if any(used):
            for first, last in _gaps(used):
                if last - first >= _SHORTEST_RUN:
                    heapq.heappush(heap, (first - last, start + first, target + first))
        else:
            places[start : start - negative] = range(target, target - negative)
            taken[target : target - negative] = bytes([1]) * -negative


def _drop_chance(places: list[int | None], taken: bytearray) -> None:
    """Free what is no passage: runs that follow one another closely in both texts and are too short together."""
    # Of short texts less is a passage: chance has fewer places.
    least = min(_SHORTEST_PASSAGE, len(places) // 4, len(taken) // 4)
    passage: list[int] = []  # places in the generated text
    for index in itertools.chain((i for i, place in enumerate(places) if place is not None), [None]):
        if passage and (
            index is None
            or index - passage[-1] > _LARGEST_BREAK
            or not 0 < places[index] - places[passage[-1]] <= _LARGEST_BREAK
        ):
            if len(passage) < least:
                for stray in passage:
                    taken[places[stray]], places[stray] = 0, None
            passage = []
        if index is not None:
            passage.append(index)


def _move_cuts(places: list[int | None], taken: bytearray, generated: str, truth: str, starts: Collection[int]) -> None:
    """Let passages that follow one another in the generated text alone part where words begin, if both may part there.

    The longer of two has swallowed what both have: a chance letter, or words that many lines begin with. What is left
    out is left out from the beginning of a line on more often than up to its end: the first such word is taken.
    """

    def spare(index: int, place: int, step: int) -> int:
        """How many characters from `index` on, all of one passage, the other one's text holds as well, from `place`."""
        count = 0
        while (
            0 <= place < len(truth)
            and not taken[place]
            and 0 <= index < len(places)
            and places[index] is not None
            and (count == 0 or places[index] == places[index - step] + step)
            and generated[index] == truth[place]
        ):
            index, place, count = index + step, place + step, count + 1
        return count

    for cut in range(1, len(places)):
        last, first = places[cut - 1], places[cut]
        if last is None or first is None or first == last + 1:
            continue
        words = {
            move: (last + 1 + move in starts) + (first + move in starts)
            for move in range(-spare(cut - 1, first - 1, -1), spare(cut, last + 1, 1) + 1)
        }
        best = max(words, key=lambda move: (words[move], -move)) if any(words.values()) else 0
        for index in range(cut + min(best, 0), cut + max(best, 0)):
            taken[places[index]] = 0
            places[index] = index - cut + (first if best < 0 else last + 1)
            taken[places[index]] = 1


def _beside(places: Sequence[int | None], taken: Sequence[int], start: int, end: int) -> list[int]:
    """Free places of the truth that may belong to a gap of the generated text, in order.

    They follow what stands before the gap, or come before what stands after it; little more than the gap is long.
    """
    most = min(_LARGEST_GAP, (end - start) * 5 // 4 + 4)
    first = 0 if start == 0 else places[start - 1] + 1
    last = len(taken) if end == len(places) else places[end]
    after = list(itertools.takewhile(lambda spot: not taken[spot], range(first, min(first + most, len(taken)))))
    before = list(itertools.takewhile(lambda spot: not taken[spot], range(last - 1, max(last - 1 - most, -1), -1)))
    return list(dict.fromkeys([*after, *reversed(before)]))


def _gaps(used: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of zeros."""
    runs = itertools.groupby(range(len(used)), key=lambda index: bool(used[index]))
    return [(indices[0], indices[-1] + 1) for indices in (list(run) for taken, run in runs if not taken)]

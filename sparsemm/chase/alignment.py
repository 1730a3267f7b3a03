"""Aligning two texts whose passages stand in another order, with reading errors (spec section 5, match rules)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rapidfuzz.distance import Indel, Levenshtein

_SHORTEST_RUN = 8
"""Characters that two texts must have in common in a row to be the same passage: fewer coincide by chance."""

_LARGEST_GAP = 200
"""Between two passages, texts up to so long are taken for one another, with reading errors."""


def align(generated: str, truth: str) -> list[int | None]:
    """For each character of `generated` the place in `truth` that it was read from, or None; blocks may be moved.

    Common runs of a longest common subsequence are kept, then those of what is left of both texts, until there is none:
    so a block is found wherever it stands. Runs are drawn out as far as both texts agree, and what is left between two
    of them is aligned by fewest edits with what the truth has beside them.
    """
    places: list[int | None] = [None] * len(generated)
    taken = bytearray(len(truth))

    def place(index: int, target: int) -> None:
        places[index], taken[target] = target, 1

    while True:
        found = False
        # What is left, cut where something was taken out; the marks keep runs from crossing the cuts.
        left, left_places = _rest([spot is not None for spot in places], generated, "\ue000")
        right, right_places = _rest(taken, truth, "\ue001")
        for block in Indel.opcodes(left, right):
            if block.tag == "equal" and block.src_end - block.src_start >= _SHORTEST_RUN:
                found = True
                for step in range(block.src_end - block.src_start):
                    place(left_places[block.src_start + step], right_places[block.dest_start + step])
        if not found:
            break
    for step, order in ((1, range(1, len(places))), (-1, range(len(places) - 2, -1, -1))):
        for index in order:
            neighbour = places[index - step]
            if places[index] is None and neighbour is not None:
                target = neighbour + step
                if 0 <= target < len(truth) and not taken[target] and generated[index] == truth[target]:
                    place(index, target)
    for start, end in _gaps([spot is not None for spot in places]):
        if end - start >= _LARGEST_GAP:
            continue
        beside = _beside(places, taken, start, end)
        for block in Levenshtein.opcodes(generated[start:end], "".join(truth[spot] for spot in beside)):
            if block.tag == "equal":
                for step in range(block.src_end - block.src_start):
                    place(start + block.src_start + step, beside[block.dest_start + step])
    return places


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


def _rest(used: Sequence[int], text: str, mark: str) -> tuple[str, list[int]]:
    """The pieces of `text` that are not used and long enough for a run, a mark after each; and their places in it."""
    gaps = [(start, end) for start, end in _gaps(used) if end - start >= _SHORTEST_RUN]
    return "".join(text[start:end] + mark for start, end in gaps), [
        place for start, end in gaps for place in range(start, end + 1)
    ]

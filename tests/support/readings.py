"""Readings of a page whose tokens have known owners: in another order, with parts left out, with errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from sparsemm.chase.matching import can_match, normalise
from sparsemm.documents.synthdog import make_document

Piece = tuple[str, int | None]
"""A text and the index of the word that it was read from, None for what stands nowhere."""


def page_lines(index: int, least: int = 250) -> list[list[Piece]]:
    """The words of a page of running text, line by line, each with its own number; at least so many."""
    lines: list[list[Piece]] = []
    count = page = 0
    while count < least:
        for line in make_document(1000 * index + page, size=(600, 800), strength=0.0).lines:
            words = line.text.split()
            lines.append([(word, count + place) for place, word in enumerate(words)])
            count += len(words)
        page += 1
    return lines


def true(lines: list[list[Piece]], rng: random.Random) -> list[list[Piece]]:
    return lines


def swapped(lines: list[list[Piece]], rng: random.Random) -> list[list[Piece]]:
    half = len(lines) // 2
    return lines[half:] + lines[:half]


def skipped(lines: list[list[Piece]], rng: random.Random) -> list[list[Piece]]:
    return [line for number, line in enumerate(lines) if number % 4 != 2]


def interleaved(lines: list[list[Piece]], rng: random.Random) -> list[list[Piece]]:
    half = len(lines) // 2
    return [line for pair in zip(lines[:half], lines[half:], strict=False) for line in pair]


def misread(lines: list[list[Piece]], rng: random.Random) -> list[list[Piece]]:
    """One character in twenty is missing, another one, or has one beside it."""

    def misread_word(word: Piece) -> list[Piece]:
        pieces: list[Piece] = []
        for character in word[0]:
            wrong: Piece = (rng.choice("abcdefghijklmnopqrstuvwxyz0123456789"), None)
            right: Piece = (character, word[1])
            fault = rng.randrange(3) if rng.random() < 0.05 else None
            pieces += {None: [right], 0: [wrong], 1: [right, wrong], 2: []}[fault]
        return [*pieces, (" ", word[1])]

    return [[piece for word in line for piece in misread_word(word)] for line in lines]


READINGS: dict[str, Callable[[list[list[Piece]], random.Random], list[list[Piece]]]] = {
    "true": true,
    "swapped": swapped,
    "skipped": skipped,
    "interleaved": interleaved,
    "misread": misread,
}


def read(lines: list[list[Piece]], kind: str, seed: int) -> tuple[str, list[int | None]]:
    """The text of a reading, and for each character that is no space the word that it was read from."""
    made = READINGS[kind](lines, random.Random(seed))
    separator = "" if kind == "misread" else " "
    text = separator.join(piece for line in made for piece, _ in line)
    return text, [owner for line in made for piece, owner in line for character in piece if not character.isspace()]


def owners_of(tokens: Sequence[str], owners: Sequence[int | None]) -> list[int | None]:
    """The word of each token: None where it holds characters of several, of none, or no letter or digit."""
    found: list[int | None] = []
    place = 0
    for token in tokens:
        size = len("".join(token.split()))
        mine = set(owners[place : place + size])
        place += size
        found.append(mine.pop() if len(mine) == 1 and can_match(normalise(token)) else None)
    assert place == len(owners)
    return found


def cut(text: str, seed: int) -> list[str]:
    """Tokens of one to five characters, spaces at their beginnings."""
    rng = random.Random(seed)
    tokens: list[str] = []
    for word in text.split(" "):
        start = " "
        while word:
            size = rng.randint(1, 5)
            tokens.append(start + word[:size])
            start, word = "", word[size:]
    return tokens


def match_by_longest_blocks(tokens: Sequence[str], chunks: Sequence[str]) -> list[int | None]:
    """`match_aligned` by difflib: right for texts in one order, quadratic and worse."""
    (generated, token_of), (truth, chunk_of) = (
        ("".join(joined), [index for index, text in enumerate(joined) for _ in text])
        for joined in (["".join(normalise(text).split()) for text in texts] for texts in (tokens, chunks))
    )
    owners: list[list[int]] = [[] for _ in tokens]
    for block in SequenceMatcher(None, generated, truth, autojunk=False).get_matching_blocks():
        for step in range(block.size):
            owners[token_of[block.a + step]].append(chunk_of[block.b + step])
    return [
        found[0]
        if len(set(found)) == 1 and len(found) == token_of.count(index) and can_match(normalise(token))
        else None
        for index, (token, found) in enumerate(zip(tokens, owners, strict=True))
    ]


def score(found: Sequence[int | None], owners: Sequence[int | None]) -> tuple[float, float]:
    """Of the tokens that have an owner, the share that found it; and the share of wrong matches."""
    matchable = sum(owner is not None for owner in owners)
    right = sum(owner is not None and one == owner for one, owner in zip(found, owners, strict=True))
    wrong = sum(one is not None and one != owner for one, owner in zip(found, owners, strict=True))
    return right / matchable, wrong / matchable

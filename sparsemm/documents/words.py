"""Words of the synthetic pages: random strings, split by a hash so that training never sees a held-out word."""

from __future__ import annotations

import hashlib

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
ALPHABET = LETTERS + DIGITS
"""Every character a page's words are made of."""

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 5
"""One word in this many is held out."""

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"


def split_of(word: str) -> str:
    """The split, "train" or "heldout", that `word` belongs to: a fixed function of its text."""
    digest = hashlib.blake2b(word.encode("utf-8"), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "little") % HELDOUT_SHARE == 0 else "train"


def _candidate(rng: np.random.Generator, length: int) -> str:
    kind = rng.random()
    if kind < 0.45:  # pronounceable: consonants and vowels in turn
        first = int(rng.integers(2))
        sets = (_CONSONANTS, _VOWELS)
        return "".join(sets[(first + i) % 2][rng.integers(len(sets[(first + i) % 2]))] for i in range(length))
    letters = DIGITS if kind < 0.6 else ALPHABET
    return "".join(letters[i] for i in rng.integers(len(letters), size=length))


def draw_word(rng: np.random.Generator, split: str, *, min_length: int = 2, max_length: int = 7) -> str:
    """A random word of `split`: 45 % pronounceable, 15 % numbers, 40 % random letters and digits."""
    while True:
        word = _candidate(rng, int(rng.integers(min_length, max_length + 1)))
        if split_of(word) == split:
            return word

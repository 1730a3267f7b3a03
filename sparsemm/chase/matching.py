"""Which chunk of a page's text a generated token reads (spec section 5, match rules)."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsemm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_MARKS = "▁Ġ"
"""What SentencePiece and byte-level vocabularies put before the first piece of a word."""

_REPLACEMENT = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to what was generated before it; "" for special tokens.

    Works for any tokenizer: the text is the difference between decoding with and without the token. A character that is
    spread over several byte tokens belongs to the last of them.
    """
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    texts: list[str] = []
    context: list[int] = []  # tokens whose text is complete: they decide about the space before the next one
    pending: list[int] = []  # tokens since then, the last of which may be half a character
    for token_id, piece in zip(token_ids, pieces, strict=True):
        if token_id in special:
            context, pending = [], []
            texts.append("")
            continue
        pending.append(token_id)
        before, after = _decode(tokenizer, context), _decode(tokenizer, context + pending)
        if after.endswith(_REPLACEMENT) and len(pending) < 4:
            texts.append("")
            continue
        text = after[len(before) :]
        # A tokenizer without a decoder leaves the marks of its vocabulary in the text.
        if piece and piece[0] in WORD_MARKS and text.lstrip().startswith(piece[0]):
            text = text.lstrip()[1:]
        texts.append(text)
        context, pending = pending, []
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) if token_ids else ""


def normalise(text: str) -> str:
    """`text` in NFC with its case kept, without the spaces around it, inner runs of spaces as one.

    A leading U+2581, SentencePiece's word mark, goes too. Its byte-level counterpart is also a letter of Maltese, so
    `token_texts` takes that one off, which knows the vocabulary.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).lstrip(WORD_MARKS[0]).lstrip()


def can_match(text: str) -> bool:
    """Whether a token's normalised text may match at all: it holds a letter or a digit (not empty, not punctuation)."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)


def match_unique(tokens: Sequence[str], chunks: Sequence[str]) -> list[int | None]:
    """The paper's rule: a token's text is a substring of exactly one chunk (chunks are counted, not occurrences).

    Args:
        tokens: Text of each generated token, from `token_texts`.
        chunks: The page's text chunks.

    Returns:
        For each token the index of its chunk, or None.
    """
    normalised = [normalise(chunk) for chunk in chunks]
    found: list[int | None] = []
    for token in tokens:
        text = normalise(token)
        owners = [index for index, chunk in enumerate(normalised) if text in chunk] if can_match(text) else []
        found.append(owners[0] if len(owners) == 1 else None)
    return found


def match_aligned(tokens: Sequence[str], chunks: Sequence[str]) -> list[int | None]:
    """Align the generated text with the chunks in their order, so that a token found in several chunks has its own.

    Characters are aligned by common blocks, longest first, spaces left out; a token matches when every character of it
    is aligned, and all with the same chunk. Arguments and result as in `match_unique`.
    """
    generated, token_of = _spaceless(tokens)
    truth, chunk_of = _spaceless(chunks)
    lengths = Counter(token_of)
    aligned: list[set[int]] = [set() for _ in tokens]
    matched = [0] * len(tokens)
    for block in difflib.SequenceMatcher(None, generated, truth, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            token = token_of[block.a + offset]
            aligned[token].add(chunk_of[block.b + offset])
            matched[token] += 1
    found: list[int | None] = []
    for index, token in enumerate(tokens):
        whole = matched[index] == lengths[index] and len(aligned[index]) == 1
        found.append(next(iter(aligned[index])) if whole and can_match(normalise(token)) else None)
    return found


def _spaceless(texts: Sequence[str]) -> tuple[str, list[int]]:
    """The normalised texts as one string without spaces, and for each of its characters the index of its text."""
    joined: list[str] = []
    owners: list[int] = []
    for index, text in enumerate(texts):
        characters = "".join(normalise(text).split())
        joined.append(characters)
        owners.extend([index] * len(characters))
    return "".join(joined), owners


MATCH_RULES: dict[str, Callable[[Sequence[str], Sequence[str]], list[int | None]]] = {
    "unique": match_unique,
    "aligned": match_aligned,
}


def match_rule(name: str) -> Callable[[Sequence[str], Sequence[str]], list[int | None]]:
    """The function of a match rule. Raises `ConfigError` for an unknown name."""
    if name not in MATCH_RULES:
        raise ConfigError(f"match={name!r} is unknown; use one of {', '.join(MATCH_RULES)}")
    return MATCH_RULES[name]

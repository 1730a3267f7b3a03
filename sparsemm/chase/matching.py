"""Which chunk of a page's text a generated token reads (spec section 5, match rules)."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsemm.chase.alignment import align
from sparsemm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_MARKS = "▁Ġ"
"""What SentencePiece and byte-level vocabularies put before the first piece of a word."""

_REPLACEMENT = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to what was generated before it; "" for special tokens.

    Works for any tokenizer: texts are differences between what is decoded with and without a token, and together they
    are what the tokenizer decodes. A character that is spread over several byte tokens belongs to the last of them.
    """
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    core = getattr(tokenizer, "backend_tokenizer", None)
    has_decoder = core is None or core.decoder is not None
    texts = [""] * len(pieces)
    context: list[int] = []  # tokens whose text is complete: they decide about the space before the next one
    group: list[int] = []  # places of the tokens since then: several where the last one may be half a character
    for index, (token_id, piece) in enumerate(zip(token_ids, pieces, strict=True)):
        if token_id in special:
            continue
        group.append(index)
        tokens = [token_ids[place] for place in group]
        before, after = _decode(tokenizer, context), _decode(tokenizer, context + tokens)
        if index + 1 < len(pieces) and (
            after.endswith(_REPLACEMENT) or _is_byte(piece) and _is_byte(pieces[index + 1])
        ):
            continue
        text = after[len(before) :]
        if len(group) == 1:
            # A tokenizer without a decoder leaves the marks of its vocabulary in the text.
            marked = not has_decoder and piece[:1] in WORD_MARKS and text.lstrip().startswith(piece[:1])
            texts[index] = text.lstrip()[1:] if marked else text
        else:
            for place, share in zip(group, _shares(tokenizer, context, tokens, before, text), strict=True):
                texts[place] = share
        context, group = tokens, []
    return texts


def _shares(
    tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int], before: str, text: str
) -> list[str]:
    """What of `text` each of several tokens completes: as much as is decoded alike with it and with all of them."""
    ends = [0]
    for count in range(1, len(tokens)):
        so_far = _decode(tokenizer, context + tokens[:count])[len(before) :]
        ends.append(max(ends[-1], len(os.path.commonprefix([so_far, text]))))
    return [text[start:end] for start, end in itertools.pairwise([*ends, len(text)])]


def _is_byte(piece: str) -> bool:
    """Whether a piece is a byte of SentencePiece's kind: of a row of them the decoder makes characters or none."""
    return piece.startswith("<0x") and len(piece) == 6


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

    Of a dense page, most of whose tokens occur in several words, it matches about a sixth of the tokens.

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
    """Align the generated text with the chunks' in any order, so that a token found in several chunks has its own.

    Characters are aligned, spaces left out; a token matches when every character of it is aligned, and all with the
    same chunk. Arguments and result as in `match_unique`.
    """
    generated, token_of = _spaceless(tokens)
    truth, chunk_of = _spaceless(chunks)
    starts = {place for place, chunk in enumerate(chunk_of) if place == 0 or chunk != chunk_of[place - 1]}
    owners: list[set[int | None]] = [set() for _ in tokens]
    for token, place in zip(token_of, align(generated, truth, starts), strict=True):
        owners[token].add(None if place is None else chunk_of[place])
    return [
        next(iter(found)) if len(found) == 1 and can_match(normalise(token)) else None
        for token, found in zip(tokens, owners, strict=True)
    ]


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

"""Which chunk a token reads: both rules, over tokenizers of every kind."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_models import toy_processor
from transformers import PreTrainedTokenizerFast

from sparsemm.chase.matching import can_match, match_aligned, match_rule, match_unique, normalise, token_texts
from sparsemm.errors import ConfigError


def byte_level_tokenizer(decoder: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind (Qwen2): bytes, and a few merged pieces with the word mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "i"), ("Ġ", "Hi")]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "Hi", "ĠHi"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if decoder:
        core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: metaspace word marks, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "</s>", "▁", "▁To", "tal", "▁2", "4", ",", "▁H", "i", "Ġ", "▁Ġ"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["</s>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def test_byte_level_pieces() -> None:
    tokenizer = byte_level_tokenizer()
    assert [normalise(text) for text in token_texts(tokenizer, tokenizer("Hi Hi").input_ids)] == ["Hi", "Hi"]
    texts = token_texts(tokenizer, tokenizer("a€b<|end|>").input_ids)
    assert texts == ["a", "", "", "€", "b", ""], "a character of three bytes belongs to its last token"
    # The letter that looks like the word mark stays.
    assert "".join(token_texts(tokenizer, tokenizer("Ġgantija").input_ids)) == "Ġgantija"
    # A decoder-less tokenizer leaves the mark in the text; it is taken off.
    bare = byte_level_tokenizer(decoder=False)
    assert [normalise(text) for text in token_texts(bare, bare("Hi Hi").input_ids)] == ["Hi", "Hi"]


def test_sentencepiece_pieces() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁To", "tal", "▁2", "4", "</s>", "▁H", "i", "<0xC3>", "<0xA9>"])
    texts = token_texts(tokenizer, ids)
    assert [normalise(text) for text in texts] == ["To", "tal", "2", "4", "", "H", "i", "", "é"]
    assert texts[2] == " 2"
    # What marks words in other vocabularies is a letter in this one.
    letters = tokenizer.convert_tokens_to_ids(["▁Ġ", "i", "Ġ", "▁Ġ"])
    assert "".join(token_texts(tokenizer, letters)) == tokenizer.decode(letters) == "ĠiĠ Ġ"


def test_rows_of_bytes_are_characters_only_where_all_of_them_are() -> None:
    tokenizer = sentencepiece_tokenizer()
    for bytes_, expected in (("E4 B8 AD E6", "����"), ("E4 B8 AD E6 96 87", "中文"), ("C3", "�")):
        ids = tokenizer.convert_tokens_to_ids([f"<0x{byte}>" for byte in bytes_.split()] + ["i"])
        texts = token_texts(tokenizer, ids)
        assert "".join(texts) == tokenizer.decode(ids) == expected + "i"
    assert token_texts(
        tokenizer, tokenizer.convert_tokens_to_ids([f"<0x{byte}>" for byte in "E4 B8 AD E6 96 87".split()])
    ) == [*("", "", "中", "", "", "文")]


def test_character_pieces() -> None:
    tokenizer = toy_processor("qwen2-vl").tokenizer
    text = "ab c-9"
    assert token_texts(tokenizer, tokenizer(text).input_ids) == list(text)
    assert token_texts(tokenizer, []) == []


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30))
def test_byte_level_texts_add_up(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    if "\ufffd" in text or "<|end|>" in text:
        return
    assert "".join(token_texts(tokenizer, tokenizer(text).input_ids)) == text


def test_normalise() -> None:
    assert normalise("  ▁Total ") == "Total"
    assert normalise("a\t\n b") == "a b"
    assert normalise("e\u0301") == "\u00e9" == unicodedata.normalize("NFC", "e\u0301")
    assert normalise("TOTAL") == "TOTAL"
    assert normalise("▁") == normalise(" ") == ""


@pytest.mark.parametrize("text", ["", ".", "--", "«»", "…", "$", "|", "\ufffd", "€"])
def test_what_never_matches(text: str) -> None:
    assert not can_match(text)
    assert match_unique([text], [f"a{text}b"]) == [None]
    assert match_aligned([text], [text or "x"]) == [None]


def test_unique_counts_chunks_not_occurrences() -> None:
    chunks = ["banana", "Total", "Tax 24", "24"]
    tokens = ["an", "▁Tot", " Tax", "24", "T", "x 2", "BAN", "", ".", "zzz"]
    assert match_unique(tokens, chunks) == [0, 1, 2, None, None, 2, None, None, None, None]


def test_unique_compares_in_nfc() -> None:
    assert match_unique(["caf\u00e9"], ["cafe\u0301", "other"]) == [0]


def test_aligned_tells_equal_chunks_apart() -> None:
    chunks = ["24", "Tax", "24"]
    assert match_aligned(["2", "4", " ", "Ta", "x", " 24"], chunks) == [0, 0, None, 1, 1, 2]
    assert match_unique(["2", "4", " ", "Ta", "x", " 24"], chunks) == [None, None, None, 1, 1, None]


def test_aligned_survives_reading_errors() -> None:
    chunks = ["alpha", "beta", "gamma"]
    tokens = list("alphX") + [" "] + list("bta") + ["\n"] + list("gamma!")
    expected = [0] * 4 + [None] * 2 + [1] * 3 + [None] + [2] * 5 + [None]
    assert match_aligned(tokens, chunks) == expected


def test_aligned_token_over_two_chunks_matches_neither() -> None:
    assert match_aligned(["ab", "cd"], ["a", "bcd"]) == [None, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="abc1", min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 999))
def test_perfect_reading_is_aligned_entirely(chunks: list[str], seed: int) -> None:
    """Whatever the tokens, what is read without an error finds its own chunk, repeated words included."""
    rng = random.Random(seed)
    tokens, owners = [], []
    for index, chunk in enumerate(chunks):
        start = 0
        while start < len(chunk):
            size = rng.randint(1, 3)
            tokens.append((" " if start == 0 else "") + chunk[start : start + size])
            owners.append(index)
            start += size
    assert match_aligned(tokens, chunks) == owners


def test_unknown_rule() -> None:
    assert match_rule("unique") is match_unique
    with pytest.raises(ConfigError, match="'fuzzy'"):
        match_rule("fuzzy")

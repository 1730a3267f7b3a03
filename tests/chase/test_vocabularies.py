"""Matching with the vocabularies of real models, where their packages are at hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from readings import READINGS, owners_of, page_lines, read, score
from vocabularies import VOCABULARIES, vocabulary

from sparsemm.chase.matching import match_aligned, match_unique, token_texts

SAMPLES = {
    "latin": "The quick brown fox, naïve façade — Ünïcödé; l'été où ça?",
    "digits": "0 12 345.67 1,024 2026-11-21 3.14e-10",
    "cyrillic": "Съешь ещё этих мягких французских булок",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "arabic": "نص حكيم له سر قاطع",
    "hebrew": "דג סקרן שט בים",
    "hindi": "ऋषियों को सताने वाले",
    "thai": "เป็นมนุษย์สุดประเสริฐ",
    "chinese": "生成的模板文件数量由选项进行控制。",
    "japanese": "いろはにほへと ちりぬるを",
    "korean": "키스의 고유조건은",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇩🇪 🎉!",
    "marks": "▁under▁ Ġgantija «x» a  b\tc\nd",
}
PAGES = [page_lines(index) for index in range(2)]


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("script", SAMPLES)
def test_texts_of_tokens_are_what_is_decoded(name: str, script: str) -> None:
    tokenizer = vocabulary(name)
    ids = tokenizer(SAMPLES[script], add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(texts) == len(ids)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_of_random_tokens_are_what_is_decoded(name: str) -> None:
    """Broken characters and stray bytes in every order."""
    tokenizer = vocabulary(name)
    rng = random.Random(0)
    plain = [index for index in range(len(tokenizer)) if index not in tokenizer.all_special_ids]
    # The bytes of either kind of vocabulary are its first pieces.
    stray = [index for index in plain if index < 262]
    for trial in range(60):
        ids = rng.choices(plain if trial % 2 else stray, k=40) + rng.choices(plain, k=5)
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_character_of_several_tokens_belongs_to_the_last(name: str) -> None:
    tokenizer = vocabulary(name)
    ids = tokenizer("a𐍈𝄞b", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).strip() == "a𐍈𝄞b" and "\ufffd" not in "".join(texts)
    assert [text for text in texts if text.strip()][-3:] == ["𐍈", "𝄞", "b"] and "" in texts


def test_a_word_mark_that_was_read_stays() -> None:
    tokenizer = vocabulary("qwen")
    ids = tokenizer("Ġgantija Ġ", add_special_tokens=False).input_ids
    assert "".join(token_texts(tokenizer, ids)) == "Ġgantija Ġ"


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("kind", READINGS)
def test_a_page_s_own_text_finds_its_words(name: str, kind: str) -> None:
    tokenizer = vocabulary(name)
    scores, unique = [], []
    for index, lines in enumerate(PAGES):
        text, owners = read(lines, kind, seed=index)
        tokens = token_texts(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
        chunks = [word for line in lines for word, _ in line]
        known = owners_of(tokens, owners)
        scores.append(score(match_aligned(tokens, chunks), known))
        unique.append(score(match_unique(tokens, chunks), known))
    matched, wrong = np.mean(scores, axis=0)
    assert matched >= {"interleaved": 0.9, "misread": 0.92}.get(kind, 0.99)
    assert wrong <= 0.02
    assert np.mean(unique, axis=0)[0] < 0.5, "most tokens occur in several words"

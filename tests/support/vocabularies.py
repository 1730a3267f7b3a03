"""Vocabularies that models are shipped with, out of packages kept beside the environment: see `make vocabularies`."""

from __future__ import annotations

import base64
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(sys.prefix) / "vocabularies"
VOCABULARIES = {
    "mistral": ("mistral_common", "mistral_common/data/tokenizer.model.v1"),
    "qwen": ("dashscope", "dashscope/resources/qwen.tiktoken"),
}
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def vocabulary(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of Mistral 7B ("mistral") or of Qwen ("qwen"). Skips the test where its package is absent."""
    package, member = VOCABULARIES[name]
    wheels = sorted(FOLDER.glob(f"{package}-*.whl"))
    if not wheels:
        pytest.skip(f"{package} is not in {FOLDER}; fetch it with make vocabularies")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        data = wheel.read(member)
    return _sentencepiece(data) if name == "mistral" else _tiktoken(data)


def _sentencepiece(data: bytes) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE model out of SentencePiece's file: a list of pieces, the better ones first."""
    pieces = list(_pieces(data))
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [pair for piece in pieces[259:] for pair in _splits(piece, ids)]
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _pieces(data: bytes):
    """Field 1 of each field 1 of a protocol buffer: the texts of a SentencePiece model's pieces."""
    for number, value in _fields(data):
        if number == 1:
            yield next(text for inner, text in _fields(value) if inner == 1).decode()


def _fields(data: bytes):
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, data[place : place + length]
        place += length


def _tiktoken(data: bytes) -> PreTrainedTokenizerFast:
    """A byte-level BPE model out of lines of a piece's bytes (base64) and its rank."""
    alphabet = _byte_characters()
    pieces = [
        "".join(alphabet[byte] for byte in base64.b64decode(line.split()[0])) for line in data.splitlines() if line
    ]
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [pair for piece in pieces[256:] for pair in _splits(piece, ids)]
    core = Tokenizer(models.BPE(vocab=ids, merges=merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _splits(piece: str, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that a piece is made of, the pair of earlier pieces first."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return sorted(
        (pair for pair in pairs if pair[0] in ids and pair[1] in ids), key=lambda pair: [ids[p] for p in pair]
    )


def _byte_characters() -> list[str]:
    """GPT-2's printable character of each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]

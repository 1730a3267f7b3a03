"""Training batches: token ids of whole conversations, with the page as symbols or as pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from sparsemm.documents.layout import Layout, field_prompt, make_layout, max_words
from sparsemm.documents.render import render
from sparsemm.documents.words import ALPHABET
from sparsemm.miniatures.tokenizer import CHAT_TEMPLATES, QWEN, build_tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Mix:
    """Pages of `rows` x `columns` cells: `fewest_words`..`most_words` words, or forms of up to `most_fields` fields.

    `slips` is the share of an answer's characters that the model sees written wrong when it goes on: it learns not to
    lose its place after an error of its own.
    """

    rows: int = 14
    columns: int = 14
    fewest_words: int = 1
    most_words: int = 8
    most_fields: int = 6
    field_share: float = 0.3
    slips: float = 0.05


@dataclass
class Batch:
    """`B` conversations, padded on the right.

    `input_ids` int64 `[B, S]` holds the page's symbols at image tokens; `labels` int64 `[B, S]` the next token where it
    is learned, else -100; `positions` int64 `[3, S]` the M-RoPE positions (three equal rows for 1-D RoPE); `image` the
    slice of S that the image tokens take; `pixels` uint8 `[B, height, width, 3]` or None; `blanks` the symbols without
    ink: a blank cell's and a newline's.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    image: slice
    pixels: np.ndarray | None
    blanks: torch.Tensor


tokenizer_of = cache(build_tokenizer)
"""The family's tokenizer, built once a process."""


@lru_cache(maxsize=4096)
def prompt_ids(family: str, prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after the image of a one-question conversation, as the chat template writes it."""
    tokenizer = tokenizer_of(family)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = tokenizer.apply_chat_template(
        [message], chat_template=CHAT_TEMPLATES[family], add_generation_prompt=True, tokenize=False
    )
    before, after = text.split(tokenizer.image_token)
    return tuple(tokenizer.encode(before)), tuple(tokenizer.encode(after))


@lru_cache(maxsize=4096)
def next_turn_ids(family: str, prompt: str) -> tuple[int, ...]:
    """Token ids between an answer and the next in a conversation that goes on with `prompt`, as the template writes."""
    tokenizer = tokenizer_of(family)
    answered = "0000" + tokenizer.eos_token
    turns = [("user", prompt), ("assistant", "0000"), ("user", prompt)]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        chat_template=CHAT_TEMPLATES[family], add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    return tuple(tokenizer.encode(text.partition(answered)[2]))


def questions(layout: Layout, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What is asked about a page, with the answers: its own question, then a form's other fields in random order."""
    asked = [(layout.prompt, layout.answer)]
    if layout.task == "field":
        texts = [word.text for word in layout.words]
        fields = [
            (field_prompt(label.rstrip(":")), value) for label, value in zip(texts[::2], texts[1::2], strict=True)
        ]
        asked += [fields[i] for i in rng.permutation(len(fields)) if fields[i] != asked[0]]
    return asked


def conversation(family: str, layout: Layout, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Token ids of a page's whole conversation, and the same with `IGNORE` wherever nothing is answered."""
    tokenizer = tokenizer_of(family)
    ids: list[int] = []
    answers: list[int] = []
    for prompt, answer in questions(layout, rng):
        if ids:
            turn = list(next_turn_ids(family, prompt))
        else:
            before, after = prompt_ids(family, prompt)
            turn = [*before, *page_symbols(family, layout), *after]
        reply = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        ids += turn + reply
        answers += [IGNORE] * len(turn) + reply
    return ids, answers


def page_symbols(family: str, layout: Layout) -> list[int]:
    """The image tokens of a page as token ids: a character or " " per cell; LLaVA adds its base view and newlines."""
    tokenizer = tokenizer_of(family)
    ids = _character_ids(family)
    blank = ids[" "]
    rows = [[ids.get(character, blank) for character in row] for row in layout.cells()]
    if family in QWEN:
        return [symbol for row in rows for symbol in row]
    newline = tokenizer.convert_tokens_to_ids("\n")
    base = [blank] * ((layout.rows // 2) * (layout.columns // 2))
    return base + [symbol for row in rows for symbol in (*row, newline)]


@cache
def _character_ids(family: str) -> dict[str, int]:
    return {text: index for text, index in tokenizer_of(family).get_vocab().items() if len(text) == 1}


def image_positions(family: str, start: int, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """RoPE positions of the image tokens, `[3, tokens]`, and the position of the text that follows."""
    if family in QWEN:
        grid = np.stack([np.zeros((rows, columns)), *np.mgrid[0:rows, 0:columns]]).reshape(3, -1).astype(np.int64)
        return grid + start, start + max(rows, columns)
    count = (rows // 2) * (columns // 2) + rows * (columns + 1)
    return np.tile(np.arange(start, start + count), (3, 1)), start + count


def draw_layout(rng: np.random.Generator, mix: Mix, split: str) -> Layout:
    """One random layout of `mix`."""
    task = "field" if rng.random() < mix.field_share and mix.columns >= 9 else "read"
    most = min(mix.most_fields if task == "field" else mix.most_words, max_words(task, mix.rows, mix.columns))
    fewest = 1 if task == "field" else mix.fewest_words
    count = int(rng.integers(fewest, most + 1))
    return make_layout(rng, split=split, task=task, num_words=count, rows=mix.rows, columns=mix.columns)


def make_batch(
    family: str, mix: Mix, batch_size: int, seed: tuple[int, ...], *, split: str = "train", draw: bool = False
) -> Batch:
    """The batch of `seed`: with `draw`, the pages are also rendered (`pixels`)."""
    rng = np.random.default_rng(list(seed))
    layouts = [draw_layout(rng, mix, split) for _ in range(batch_size)]
    pixels = np.stack([render(layout, rng, split)[0] for layout in layouts]) if draw else None
    conversations = [conversation(family, layout, rng) for layout in layouts]
    # Few different lengths: the CPU library compiles its kernels anew for every shape.
    length = -(-(max(len(ids) for ids, _ in conversations) - 1) // 32) * 32
    input_ids = np.full((batch_size, length), tokenizer_of(family).pad_token_id, dtype=np.int64)
    labels = np.full((batch_size, length), IGNORE, dtype=np.int64)
    for row, (ids, answers) in enumerate(conversations):
        shown = np.array(ids[:-1])
        if split == "train":
            written = (np.array(answers[:-1]) != IGNORE) & (shown < len(ALPHABET))
            wrong = written & (rng.random(len(shown)) < mix.slips)
            shown[wrong] = rng.integers(len(ALPHABET), size=wrong.sum())
        input_ids[row, : len(shown)] = shown
        labels[row, : len(shown)] = answers[1:]
    before, _ = prompt_ids(family, layouts[0].prompt)
    first = len(before)
    block, after_image = image_positions(family, first, mix.rows, mix.columns)
    image = slice(first, first + block.shape[1])
    tail = np.tile(np.arange(after_image, after_image + length - image.stop), (3, 1))
    positions = np.concatenate([np.tile(np.arange(first), (3, 1)), block, tail], axis=1)
    characters = _character_ids(family)
    return Batch(
        *map(torch.from_numpy, (input_ids, labels, positions)), image, pixels,
        blanks=torch.tensor([characters[" "], characters["\n"]]),
    )  # fmt: skip

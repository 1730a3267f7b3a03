"""Chasing on toy models, against eager attention matrices and plain loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import FAMILIES, toy_model, toy_processor

from sparsemm import HeadScores
from sparsemm.chase import READ_PROMPT, chase, count_hits, journal_path, read_page
from sparsemm.chase.matching import match_rule, token_texts
from sparsemm.errors import ConfigError, DataError, HeadScoreError
from sparsemm.models import family_of

NEW_TOKENS = 14


@dataclass
class Word:
    text: str
    box: tuple[float, float, float, float]


@dataclass
class ToyPage:
    image: Any
    words: list[Word]


def picture(index: int) -> Image.Image:
    width, height = ((48, 48), (60, 30), (25, 50))[index % 3]
    noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_pages(model: torch.nn.Module, processor: Any, count: int = 3) -> list[ToyPage]:
    """Pages whose words are made of what the random model will say, in boxes wide enough to be hit now and then."""
    pages = []
    for index in range(count):
        image = picture(index)
        width, height = image.size
        inputs = family_of(model).build_inputs(processor, [image], [READ_PROMPT])
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
        texts = [text for text in token_texts(processor.tokenizer, ids) if text.strip()]
        words = [Word("".join(texts[:5]), (0, 0, width * 0.6, height - 1.0)), Word("".join(texts[5:9]), (5, 5, 20, 20))]
        # The first words again elsewhere: only the aligned rule can tell the two apart.
        pages.append(ToyPage(image, [*words, Word("".join(texts[9:]) + texts[0], (width * 0.4, 0, width - 1.0, 9))]))
    return pages


def reference(family: str, processor: Any, pages: list[ToyPage], match: str) -> np.ndarray:
    """Scores from whole eager attention matrices: one Python loop per image, token, layer and head."""
    model = toy_model(family, attn_implementation="eager")
    num_layers, num_heads = model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    mean = [[Fraction(0)] * num_heads for _ in range(num_layers)]
    for page in pages:
        inputs = family_of(model).build_inputs(processor, [page.image], [READ_PROMPT])
        (layout,) = family_of(model).image_token_layout(model.config, inputs)[0]
        result = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, output_attentions=True, return_dict_in_generate=True
        )
        ids = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        chunks = match_rule(match)(token_texts(processor.tokenizer, ids), [word.text for word in page.words])
        for step, chunk in enumerate(chunks):
            if chunk is None:
                continue
            region = set(layout.tokens_in_box(page.words[chunk].box, page.image.size).tolist())
            for layer in range(num_layers):
                for head in range(num_heads):
                    row = result.attentions[step][layer][0, head, -1]
                    if int(row.argmax()) in region:
                        mean[layer][head] += Fraction(1, len(region)) / len(pages)
    total = sum(sum(row) for row in mean)
    return np.array([[float(value / total) for value in row] for row in mean])


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_while_chasing_is_generate(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    eager = toy_model(family, attn_implementation="eager")
    for index in range(3):
        inputs = family_of(model).build_inputs(processor, [picture(index)], [READ_PROMPT])
        length = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, length:].tolist()
        ids, columns = read_page(model, inputs, max_new_tokens=NEW_TOKENS)
        assert ids == expected
        assert model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, length:].tolist() == expected
        attentions = eager.generate(
            **inputs, max_new_tokens=NEW_TOKENS, output_attentions=True, return_dict_in_generate=True
        ).attentions
        for step, layers in enumerate(attentions):
            for layer, weights in enumerate(layers):
                assert torch.equal(columns[step, layer], weights[0, :, -1].argmax(-1)), (step, layer)
        assert columns.shape == (NEW_TOKENS, 2, 4)


@pytest.mark.parametrize("match", ["unique", "aligned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_whole_attention_matrices(family: str, match: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    pages = make_pages(model, processor)
    scores = chase(model, processor, pages, match=match, max_new_tokens=NEW_TOKENS, progress=False)
    np.testing.assert_allclose(scores.values.numpy(), reference(family, processor, pages, match), rtol=1e-12)
    assert scores.provenance["num_hits"] > 0 and scores.provenance["num_images"] == 3
    assert float(scores.values.sum()) == pytest.approx(1.0)


def test_hits_are_counted_per_chunk() -> None:
    columns = torch.tensor([[[3, 9]], [[4, 3]], [[3, 0]], [[7, 7]]])  # [4 tokens, 1 layer, 2 heads]
    boxes = {5: torch.tensor([3, 4]), 2: torch.tensor([0])}
    counts = count_hits(columns, [5, 5, 2, None], boxes, num_columns=10)
    assert {chunk: count.tolist() for chunk, count in counts.items()} == {5: [[2, 1]], 2: [[0, 1]]}
    assert count_hits(columns, [None] * 4, {}, num_columns=10) == {}


class Interrupting:
    """Pages that stop the program before page `stop`, as Ctrl-C would."""

    def __init__(self, pages: list[ToyPage], stop: int) -> None:
        self.pages, self.stop = pages, stop

    def __iter__(self) -> Iterator[ToyPage]:
        for index, page in enumerate(self.pages):
            if index == self.stop:
                raise KeyboardInterrupt
            yield page


@pytest.mark.parametrize("torn", [False, True])
def test_resumed_chase_gives_the_undisturbed_files(torn: bool, tmp_path: Path) -> None:
    family = "qwen2-vl"
    model, processor = toy_model(family), toy_processor(family)
    pages = make_pages(model, processor)
    settings: dict = dict(match="aligned", max_new_tokens=NEW_TOKENS, dataset="toy", seed=3, progress=False)
    whole, parts = tmp_path / "whole" / "scores.json", tmp_path / "parts" / "scores.json"
    chase(model, processor, pages, output=whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        chase(model, processor, Interrupting(pages, 2), output=parts, **settings)
    assert not parts.exists()
    journal = journal_path(parts)
    assert len(journal.read_text().splitlines()) == 3
    if torn:  # the power failed in the middle of a line
        journal.write_bytes(journal.read_bytes()[:-7])
    chase(model, processor, pages, output=parts, **settings)
    assert parts.read_bytes() == whole.read_bytes()
    assert journal.read_bytes() == journal_path(whole).read_bytes()
    # Everything is known now: nothing is read again.
    chase(model, processor, Interrupting(pages, 3), output=parts, **settings)
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("journal", [True, False], ids=["with its journal", "committed alone"])
def test_fewer_images_leave_a_score_file_as_it_is(
    journal: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    pages = make_pages(model, processor)
    settings: dict = dict(match="aligned", max_new_tokens=NEW_TOKENS, output=tmp_path / "scores.json", progress=False)
    chase(model, processor, pages[:2], **settings)
    if not journal:
        journal_path(settings["output"]).unlink()
    before = settings["output"].read_bytes()
    for fewer in (pages[:1], iter(pages[:1]), pages[:2]):
        assert chase(model, processor, fewer, **settings).provenance["num_images"] == 2
        assert settings["output"].read_bytes() == before
    assert "was made from 2 images, 1 are asked for: it is left as it is" in caplog.text
    assert chase(model, processor, pages, **settings).provenance["num_images"] == 3
    assert chase(model, processor, pages[:1], resume=False, **settings).provenance["num_images"] == 1
    assert HeadScores.load(settings["output"]).provenance["num_images"] == 1
    if not journal:
        HeadScores(torch.ones(2, 4)).save(settings["output"])
        with pytest.raises(DataError, match="other settings.*--fresh"):
            chase(model, processor, pages, **settings)


def test_files_of_another_chase_are_not_continued(tmp_path: Path) -> None:
    model, processor = toy_model("llava-mistral"), toy_processor("llava-mistral")
    pages = make_pages(model, processor, 1)
    output = tmp_path / "scores.json"
    chase(model, processor, pages, output=output, max_new_tokens=NEW_TOKENS, progress=False)
    with pytest.raises(DataError, match="match_rule"):
        chase(model, processor, pages, output=output, max_new_tokens=NEW_TOKENS, match="aligned", progress=False)
    retrained = toy_model("llava-mistral", seed=1)
    with pytest.raises(DataError, match="weights"):
        chase(retrained, processor, pages, output=output, max_new_tokens=NEW_TOKENS, progress=False)
    chase(
        model, processor, pages, output=output, max_new_tokens=NEW_TOKENS, match="aligned", resume=False, progress=False
    )
    assert HeadScores.load(output).provenance["match_rule"] == "aligned"
    journal_path(output).write_text("[1, 2]\n")
    output.unlink()
    with pytest.raises(DataError, match="not a journal"):
        chase(model, processor, pages, output=output, max_new_tokens=NEW_TOKENS, progress=False)


def test_broken_images_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    pages = make_pages(model, processor, 2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    mixed = [ToyPage(broken, []), pages[0], ToyPage(pages[0].image, [Word("", (1, 0, 9, 1))]), pages[1]]
    options: dict = dict(match="aligned", max_new_tokens=NEW_TOKENS, progress=False)
    scores = chase(model, processor, mixed, **options)
    assert scores.provenance["num_images"] == 2 and scores.provenance["num_skipped"] == 2
    assert "broken.png" in caplog.text and "holds no words" in caplog.text
    assert torch.equal(scores.values, chase(model, processor, pages, **options).values)
    with pytest.raises(DataError, match="none of 1 pages"):
        chase(model, processor, mixed[:1], **options)


def test_a_picture_that_has_come_meanwhile_is_read(tmp_path: Path) -> None:
    """Of an interrupted chase that had to skip it; what was read is not read again."""
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    pages = make_pages(model, processor, 2)
    late, output = tmp_path / "late.png", tmp_path / "scores.json"
    mixed = [ToyPage(late, pages[0].words), pages[1]]
    options: dict = dict(match="aligned", max_new_tokens=NEW_TOKENS, progress=False)
    assert chase(model, processor, mixed, output=output, **options).provenance["num_skipped"] == 1
    output.unlink()
    pages[0].image.save(late)
    mixed[1] = ToyPage(tmp_path / "gone.png", pages[1].words)
    again = chase(model, processor, mixed, output=output, **options)
    assert (again.provenance["num_images"], again.provenance["num_skipped"]) == (2, 0)
    assert torch.equal(again.values, chase(model, processor, pages, **options).values)
    numbers = [json.loads(line)["index"] for line in journal_path(output).read_text().splitlines()[1:]]
    assert numbers == [0, 1]


def test_provenance_is_saved_without_machine_paths(tmp_path: Path) -> None:
    folder = tmp_path / "toy-model"
    toy_model("qwen2-vl").save_pretrained(folder)
    model, processor = type(toy_model("qwen2-vl")).from_pretrained(folder).eval(), toy_processor("qwen2-vl")
    model.generation_config.eos_token_id = None
    output = tmp_path / "scores.json"
    pages = make_pages(model, processor, 2)
    chase(
        model, processor, pages, match="aligned", max_new_tokens=NEW_TOKENS, output=output, dataset="toy pages", seed=5,
        progress=False,
    )  # fmt: skip
    provenance = HeadScores.load(output).provenance
    assert provenance["model"] == "toy-model" and provenance["dataset"] == "toy pages" and provenance["seed"] == 5
    assert provenance["match_rule"] == "aligned" and provenance["num_matched"] > 0
    assert set(provenance["versions"]) == {"sparsemm", "torch", "transformers", "python"}
    assert str(tmp_path) not in output.read_text() + journal_path(output).read_text()


def test_clear_errors() -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    with pytest.raises(ConfigError, match="'exact'"):
        chase(model, processor, [], match="exact", progress=False)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        chase(model, processor, [], max_new_tokens=0, progress=False)
    with pytest.raises(ConfigError, match="least_read=1.5"):
        chase(model, processor, [], least_read=1.5, progress=False)
    with pytest.raises(HeadScoreError, match="more images"):
        chase(
            model, processor, [ToyPage(picture(0), [Word("#", (0, 0, 9, 9))])], max_new_tokens=2, least_read=0,
            progress=False,
        )  # fmt: skip
    with pytest.raises(DataError, match="none of 0 pages"):
        chase(model, processor, [], progress=False)


class Watcher(TorchDispatchMode):
    """Counts values read from the device, and notes the shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.shapes = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reads += func in (torch.ops.aten._local_scalar_dense.default,)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def test_no_prompt_attention_matrix_and_no_reads_per_head() -> None:
    reads = []
    for num_layers in (2, 5):
        model, processor = toy_model("llava-vicuna", num_layers=num_layers), toy_processor("llava-vicuna")
        inputs = family_of(model).build_inputs(processor, [picture(0)], [READ_PROMPT])
        length = inputs["input_ids"].shape[1]
        read_page(model, inputs, max_new_tokens=1)  # a model is tried out once
        with Watcher() as watcher:
            read_page(model, inputs, max_new_tokens=8)
        assert not any(shape[-2:] == (length, length) and 4 in shape[:-2] for shape in watcher.shapes)
        with Watcher() as longer:
            read_page(model, inputs, max_new_tokens=16)
        reads.append(longer.reads - watcher.reads)
    assert reads[0] == reads[1], "what a token reads from the device does not depend on the number of heads"


def test_jsonl_holds_what_each_image_gave(tmp_path: Path) -> None:
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    pages = make_pages(model, processor, 2)
    output = tmp_path / "scores.json"
    scores = chase(model, processor, pages, match="aligned", max_new_tokens=NEW_TOKENS, output=output, progress=False)
    header, *records = [json.loads(line) for line in journal_path(output).read_text().splitlines()]
    assert header["settings"]["max_new_tokens"] == NEW_TOKENS
    assert [record["index"] for record in records] == [0, 1]
    assert sum(record["hits"] for record in records) == scores.provenance["num_hits"]
    total = torch.zeros(2, 4, dtype=torch.float64)
    for record in records:
        for layer, head, score in record["scores"]:
            total[layer, head] += score
    torch.testing.assert_close(total / total.sum(), scores.values, rtol=1e-12, atol=0)

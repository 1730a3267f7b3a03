"""What a chase does with real pages: scans, torn files, words without tokens, readings that do not end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from readings import match_by_longest_blocks
from tiny_pdf import Sheet, text, write
from toy_models import toy_model, toy_processor

import sparsemm.chase.page as page_module
from sparsemm import load_model
from sparsemm.chase import READ_PROMPT, chase, chase_page, journal_path
from sparsemm.chase.matching import match_aligned, match_unique, token_texts
from sparsemm.cli.common import checkout
from sparsemm.datasets import BoxedImage, convert, open_pages
from sparsemm.documents.pages import TextBox
from sparsemm.errors import ConfigError, DataError
from sparsemm.head_scores import rank_correlation
from sparsemm.models import family_of

NEW_TOKENS = 12
MINIATURE = checkout() / "assets" / "miniatures" / "llava-vicuna"


def noise(index: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def said(model: Any, processor: Any, image: Image.Image) -> list[str]:
    """What the model says to a picture, token by token."""
    inputs = family_of(model).build_inputs(processor, [image], [READ_PROMPT])
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
    return token_texts(processor.tokenizer, ids)


def record(
    page: Any, *, model: Any = None, family: str = "qwen2-vl", find: Any = match_aligned, tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    model = model or toy_model(family)
    return chase_page(model, toy_processor(family), page, find, prompt=READ_PROMPT, part=None, max_new_tokens=tokens)


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reading a page an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the page was read")

    monkeypatch.setattr(page_module, "read_page", refuse)


def test_pages_without_words_are_not_read(no_reading: None, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    scan = open_pages(write(tmp_path / "scan.pdf", Sheet("0 0 90 90 re f"), Sheet(text("word", 20, 50))))[0]
    assert "text layer" in record(scan)["skipped"]
    for words in ([], [TextBox(" ", (0, 0, 9, 9))], [TextBox("far", (90, 90, 99, 99))]):
        assert record(BoxedImage("blank", noise(), words))["skipped"] == "it holds no words"


def test_torn_and_encrypted_files_do_not_end_a_chase(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.5 torn")
    locked = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'ab' * 32}> /U <{'cd' * 32}> >> /ID [<00> <00>]"
    write(tmp_path / "b.pdf", Sheet(text("word", 20, 50)), trailer=locked)
    letters = [text(line, 5, 5 + 65 * row, 70) for row, line in enumerate(("012345", "789ABC", "DEFGHJ"))]
    write(tmp_path / "c.pdf", Sheet("".join(letters)), Sheet(""))
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    pages = open_pages(tmp_path, max_pixels=2000)
    scores = chase(model, processor, pages, max_new_tokens=96, least_read=0.0, progress=False)
    assert (scores.provenance["num_images"], scores.provenance["num_skipped"]) == (1, 3)


def test_words_without_tokens_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a processor crops: the first word's box lies outside of what the model sees."""
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    texts = said(model, processor, noise())
    words = [TextBox("".join(texts[:6]), (0, 0, 5, 5)), TextBox("".join(texts[6:]), (20, 10, 39, 29))]
    whole = record(BoxedImage("a", noise(), words))
    family = family_of(model)
    before = type(family).image_token_layout

    def cropped(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = before(self, *args, **kwargs)
        for layout in rows[0]:
            layout.regions["grid"] = (10.0, 0.0, 40.0, 30.0)
        return rows

    monkeypatch.setattr(type(family), "image_token_layout", cropped)
    partly = record(BoxedImage("a", noise(), words))
    assert whole["flaws"] == {} and partly["flaws"] == {"no image token": 1}
    assert 0 < partly["matched"] < whole["matched"]
    assert partly["read"] == whole["read"], "what was read is not a matter of tokens"


def test_flaws_of_words_are_counted_over_the_pages(tmp_path: Path) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    spoken = TextBox("".join(said(model, processor, noise())), (39, 29, 0, 0))
    page = BoxedImage("a", noise(), [spoken, TextBox("", (0, 0, 9, 9)), TextBox("far", (99, 0, 109, 9))])
    scores = chase(model, processor, [page, page], max_new_tokens=NEW_TOKENS, match="aligned", progress=False)
    assert scores.provenance["num_flaws"] == {"inverted box": 2, "no text": 2, "outside the image": 2}


def test_readings_that_did_not_end_are_counted() -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    page = BoxedImage("a", noise(), [TextBox("".join(said(model, processor, noise())), (0, 0, 39, 29))])
    assert record(page)["cut"] and record(page)["tokens"] == NEW_TOKENS
    end = processor.tokenizer(said(model, processor, noise())[4]).input_ids[0]
    model.generation_config.eos_token_id = end
    ended = record(page, model=model)
    assert ended["tokens"] < NEW_TOKENS and not ended["cut"]


def test_readings_end_with_the_model_s_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    page = BoxedImage("a", noise(), [TextBox("".join(said(model, processor, noise())), (0, 0, 39, 29))])
    length = family_of(model).build_inputs(processor, [noise()], [READ_PROMPT])["input_ids"].shape[1]
    text_config = family_of(model).text_model(model).config
    monkeypatch.setattr(text_config, "max_position_embeddings", length + 5)
    read = record(page, model=model, tokens=1024)
    assert read["tokens"] == 5 and read["cut"]
    monkeypatch.setattr(text_config, "max_position_embeddings", length)
    assert "positions" in record(page, model=model)["skipped"]


def test_a_model_that_cannot_read_is_not_chased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    texts = said(model, processor, noise())
    read = BoxedImage("read", noise(), [TextBox("".join(texts), (0, 0, 39, 29))])
    unread = BoxedImage("unread", noise(), [TextBox("\u4e2d\u6587", (0, 0, 39, 29))])
    options: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, match="aligned", progress=False)
    looked: list[str] = []
    original = page_module.read_page

    def counted(*args: Any, **kwargs: Any) -> Any:
        looked.append("page")
        return original(*args, **kwargs)

    monkeypatch.setattr("sparsemm.chase.page.read_page", counted)
    output = tmp_path / "scores.json"
    with pytest.raises(DataError, match="cannot read them"):
        chase(model, processor, [unread] * 9, output=output, **options)
    assert len(looked) == 5 and not output.exists(), "after the first pages"
    with pytest.raises(DataError, match="cannot read them"):  # at once, when it is started again
        chase(model, processor, [unread] * 9, output=output, **options)
    assert len(looked) == 5 and len(journal_path(output).read_text().splitlines()) == 6
    with pytest.raises(DataError, match="cannot read them"):  # fewer pages, at the end
        chase(model, processor, [unread] * 2, **options)
    with pytest.raises(DataError, match="cannot read them"):  # enough at first, too few in all
        chase(model, processor, [read] * 5 + [unread] * 5, output=tmp_path / "b.json", least_read=0.7, **options)
    assert not (tmp_path / "b.json").exists()
    scores = chase(model, processor, [read] * 5 + [unread] * 5, least_read=0.3, **options)
    assert scores.provenance["num_images"] == 10
    assert scores.provenance["num_matchable"] == 2 * scores.provenance["num_matched"] > 0


def test_the_exact_grid_is_a_setting_of_a_chase(tmp_path: Path) -> None:
    """A box whose cell is another one without the padding above the page: other tokens count."""
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    pages = []
    for height, bottom in ((33, 2), (56, 30)):
        image = noise().resize((100, height))
        words = [TextBox("".join(said(model, processor, image)), (0, 0, 99, bottom))]
        pages.append(BoxedImage("wide", image, words))
    options: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, match="aligned", progress=False)
    output = tmp_path / "scores.json"
    plain = chase(model, processor, pages, output=output, **options)
    exact = chase(model, processor, pages, exact_grid=True, **options)
    assert plain.provenance["exact_grid"] is None and exact.provenance["exact_grid"] is True
    assert plain.provenance["num_hits"] != exact.provenance["num_hits"]
    with pytest.raises(DataError, match="exact_grid: None there, True here.*--fresh"):
        chase(model, processor, pages, output=output, exact_grid=True, **options)
    with pytest.raises(ConfigError, match="no use with qwen2_vl"):
        chase(toy_model("qwen2-vl"), toy_processor("qwen2-vl"), pages, exact_grid=True, **options)


def test_a_journal_of_before_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Whose records lack what is counted today, and whose settings lack what is set today."""
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    page = BoxedImage("a", noise(), [TextBox("".join(said(model, processor, noise())), (0, 0, 39, 29))])
    output = tmp_path / "scores.json"
    options: dict[str, Any] = dict(output=output, max_new_tokens=NEW_TOKENS, match="aligned", progress=False)
    scores = chase(model, processor, [page, page], **options)
    output.unlink()
    header, *records = map(json.loads, journal_path(output).read_text().splitlines())
    for removed in ("cut", "read", "matchable", "flaws"):
        for record in records:
            del record[removed]
    del header["settings"]["record"]
    journal_path(output).write_text("".join(json.dumps(line) + "\n" for line in [header, *records]))
    with pytest.raises(DataError, match=r"scores.images.jsonl .* other settings \(record\).* --fresh"):
        chase(model, processor, [page, page], **options)
    again = chase(model, processor, [page, page], resume=False, **options)
    assert torch.equal(again.values, scores.values) and "record" not in again.provenance


def test_the_unique_rule_is_not_taken_for_bad_reading() -> None:
    """On a page that says everything twice that rule matches nothing; the page was read all the same."""
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    spoken = "".join(said(model, processor, noise()))
    page = BoxedImage("a", noise(), [TextBox(spoken, (0, 0, 39, 29)), TextBox(spoken, (0, 0, 19, 29))])
    found = record(page, find=match_unique)
    assert found["matched"] == 0 and found["read"] == found["matchable"] > 0


@pytest.mark.skipif(not (MINIATURE / "model.safetensors").is_file(), reason="the miniature is not in the checkout")
def test_a_miniature_finds_the_same_heads_in_its_own_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    model, processor = load_model(MINIATURE)
    pages = open_pages("miniature", limit=12, seed=1)
    convert(pages, tmp_path, "pdf", progress=False)
    limit = family_of(model).largest_picture(model.config, processor)
    again = open_pages(tmp_path / "pages.pdf").at_most(limit)
    options: dict[str, Any] = dict(match="aligned", max_new_tokens=48, progress=False)
    first, second = (chase(model, processor, found, **options) for found in (pages, again))
    assert first.provenance["num_hits"] > 0 and second.provenance["num_images"] == 12
    assert rank_correlation(first.values, second.values) >= 0.95


@pytest.mark.skipif(not (MINIATURE / "model.safetensors").is_file(), reason="the miniature is not in the checkout")
def test_a_miniature_s_heads_do_not_depend_on_the_aligner(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model(MINIATURE)
    options: dict[str, Any] = dict(match="aligned", max_new_tokens=48, progress=False)
    pages = open_pages("miniature", limit=6, seed=1)
    scores = chase(model, processor, pages, **options)
    monkeypatch.setattr("sparsemm.chase.run.match_rule", lambda name: match_by_longest_blocks)
    reference = chase(model, processor, pages, **options)
    assert reference.provenance["num_matched"] > 30
    assert rank_correlation(scores.values, reference.values) >= 0.999

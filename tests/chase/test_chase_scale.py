"""Long chases: killed and taken up again, shared by several processes, over data sets of every kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import chase_job
import pytest
import torch
from long_jobs import killed_and_resumed, run_here, same_files, shared_by_two
from PIL import Image
from toy_models import toy_model, toy_processor

from sparsemm import HeadScores
from sparsemm.bench.chase import chase_cost, walk_attentions
from sparsemm.chase import READ_PROMPT, chase, journal_path, read_page
from sparsemm.datasets import BoxedImage, convert, open_pages
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.runs.journal import Journal, remove_journal
from sparsemm.runs.processes import Workers, workers


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "scores.json"
    run_here(chase_job, output)
    return output


def test_a_killed_chase_goes_on_and_gives_the_same_files(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    killed_and_resumed(chase_job, output, journal_path(output))
    same_files((output, undisturbed), (journal_path(output), journal_path(undisturbed)))
    assert HeadScores.load(output).provenance["num_skipped"] == 1


def test_processes_of_accelerate_launch_share_the_pages(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    shares = re.findall(r"\d/2:\[[\d,]*\]", shared_by_two(chase_job, output))
    assert sorted(shares) == ["0/2:[0,2,4]", "1/2:[1,3,5]"], "each process opens its own pages"
    same_files((output, undisturbed), (journal_path(output), journal_path(undisturbed)))


def test_one_process_finishes_what_several_began(undisturbed: Path, tmp_path: Path) -> None:
    """Two processes were killed: each left a part, the second in the middle of a line."""
    output = tmp_path / "scores.json"
    header, *records = journal_path(undisturbed).read_bytes().splitlines(keepends=True)
    whole = journal_path(output)
    whole.with_suffix(".part0.jsonl").write_bytes(header + records[0] + records[2])
    whole.with_suffix(".part1.jsonl").write_bytes(header + records[3] + records[1][:20])
    chase_job.run(str(output))
    same_files((output, undisturbed), (whole, journal_path(undisturbed)))


def test_parts_of_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "a.images.jsonl"
    for part, index in ((1, 1), (0, 0)):
        with Journal(path, {"seed": 1}, part=part) as journal:
            journal.append(index, {"hits": index})
    assert not path.exists()
    with Journal(path, {"seed": 1}, part=1) as again:
        assert sorted(again.records) == [0, 1]
        again.append(3, {"hits": 3})
    again.merge()
    assert [json.loads(line).get("index") for line in path.read_bytes().splitlines()] == [None, 0, 1, 3]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DataError, match="seed"):
        Journal(path, {"seed": 2}, part=0)
    remove_journal(path)
    assert not list(tmp_path.iterdir())


def test_every_page_has_one_owner() -> None:
    shares = [Workers(rank, 3) for rank in range(3)]
    assert all(sum(us.owns(index) for us in shares) == 1 for index in range(10))
    assert workers() == Workers(0, 1) and workers().first


@pytest.mark.parametrize("form", ["synthdog", "mlt"])
def test_data_sets_with_a_broken_image_are_chased_to_the_end(form: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    model, processor = toy_model("llava-mistral"), toy_processor("llava-mistral")
    good = [BoxedImage(str(index), page.image, page.words) for index, page in enumerate(chase_pages())]
    convert(good, tmp_path / form, form, progress=False)
    if form == "mlt":
        (tmp_path / form / "img_000002.png").write_bytes(b"not an image")
        expected = [good[0], good[2]]
    else:
        expected = good
    options: dict = dict(max_new_tokens=6, least_read=0.0, progress=False)
    scores = chase(model, processor, open_pages(tmp_path / form), **options)
    assert scores.provenance["num_skipped"] == len(good) - len(expected)
    assert scores.values.tolist() == chase(model, processor, expected, **options).values.tolist()


def chase_pages() -> list[chase_job.SlowPage]:
    return [chase_job.SlowPage(index, 0.0) for index in range(3)]


def test_an_image_too_large_to_decode_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    Image.new("RGB", (60, 60)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pages = [BoxedImage("huge", tmp_path / "huge.png", []), chase_pages()[0]]
    options: dict = dict(max_new_tokens=6, least_read=0.0, progress=False)
    assert chase(model, processor, pages, **options).provenance["num_skipped"] == 1


@pytest.mark.parametrize("family", ["llava-mistral", "qwen2-vl"])
def test_tiles_of_tokens_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long reading is looked up piece by piece, whatever the pieces are; against eager attention's own weights."""
    model, processor = toy_model(family), toy_processor(family)
    inputs = family_of(model).build_inputs(processor, [chase_pages()[0].image], [READ_PROMPT])
    ids, columns = read_page(model, inputs, max_new_tokens=11)
    for tile in (1, 4, 11, 12):
        monkeypatch.setattr("sparsemm.chase.page._TILE", tile)
        assert torch.equal(read_page(model, inputs, max_new_tokens=11)[1], columns)
    eager = toy_model(family, attn_implementation="eager")
    result = eager.generate(**inputs, max_new_tokens=11, output_attentions=True, return_dict_in_generate=True)
    for step, layers in enumerate(result.attentions):
        for layer, weights in enumerate(layers):
            assert torch.equal(columns[step, layer], weights[0, :, -1].argmax(-1))


def test_the_loop_that_chasing_is_measured_against_finds_the_same_heads() -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    pages = chase_pages()
    scores = chase(model, processor, pages, match="aligned", max_new_tokens=8, progress=False)
    walked = sum(walk_attentions(model, processor, page, "aligned", 8)[1] for page in pages)
    torch.testing.assert_close(scores.values, walked / walked.sum(), rtol=1e-12, atol=0)
    times, figures = chase_cost(model, processor, pages[:2], max_new_tokens=8, repeats=1, progress=False)
    assert figures["pages"] == 2 and figures["tokens"] == 16 and figures["same_number_of_tokens"]
    assert figures["chase_over_plain"] == times["chase"][0] / times["plain"][0] > 0
    with pytest.raises(ConfigError, match="repeats=0"):
        chase_cost(model, processor, pages, repeats=0)
    with pytest.raises(DataError, match="no page"):
        chase_cost(model, processor, [])

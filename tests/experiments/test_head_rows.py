"""The head-rows experiment on a toy model: whose rows change, by how much, what is written, what is taken up again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_models import toy_model, toy_processor
from toy_pages import SCORES, pages

import sparsemm
from sparsemm import CompressionConfig
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError, DataError
from sparsemm.experiments.head_rows import (
    HeadRowsResults,
    _changed_method,
    changes,
    format_head_rows,
    head_rows_experiment,
)
from sparsemm.experiments.session import PageReader
from sparsemm.head_scores import rank_correlation
from sparsemm.methods import METHODS, Method, register_method
from sparsemm.models import family_of
from sparsemm.runs.metrics import character_accuracy
from sparsemm.runs.plots import save_figure
from sparsemm.viz.heads import draw_head_rows

FULL = CompressionConfig(method="fullkv", window_size=2)
SNAP = CompressionConfig(method="snapkv", budget=6, window_size=2)


def experiment(config: CompressionConfig = FULL, *, output: Path | None = None, **options) -> HeadRowsResults:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    reader = PageReader(model, processor, pages(), max_new_tokens=8, progress=False, output=output)
    return head_rows_experiment(reader, config, **options)


def accuracies(config: CompressionConfig) -> list[float]:
    """Of each page read alone."""
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    found = []
    with sparsemm.patch(model, config):
        for page in pages():
            inputs = family_of(model).build_inputs(processor, [page.image], [page.prompt])
            text = processor.tokenizer.decode(generate_greedy(model, inputs, 8)[0][0], skip_special_tokens=True)
            found.append(character_accuracy(text, page.answer))
    return found


def test_runs_equal_a_method_written_by_hand() -> None:
    results = experiment()
    assert [run.key for run in results.runs] == [(None, None), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert results.runs[0].accuracy == 1.0 and min(run.accuracy for run in results.runs) < 1.0
    assert {run.rows for run in results.runs[1:]} == {2} and results.runs[1].usual_rows > 10

    def rule(request):
        rows = torch.full((2, 2), request.prompt_length)
        rows[1, 0] = 2
        return rows

    register_method(Method("by_hand", model_budgets=rule))
    try:
        expected = accuracies(CompressionConfig(method="by_hand", budget=2, window_size=2))
    finally:
        del METHODS["by_hand"]
    run = results.find(1, 0)
    assert run.accuracy == pytest.approx(sum(expected) / 3)
    assert run.mean("accuracy", "field") == pytest.approx((expected[0] + expected[2]) / 2)
    assert run.documents_of("accuracy", "read") == pytest.approx([expected[1]])
    table = changes(results)
    assert float(table[1, 0]) == pytest.approx(sum(expected) / 3 - 1.0)
    assert float(changes(results, "read")[1, 0]) == pytest.approx(expected[1] - 1.0)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        SNAP,
        CompressionConfig(method="sparsemm", budget=6, window_size=2, head_scores=SCORES),
        CompressionConfig(method="random", budget=6, window_size=2, seed=3),
        CompressionConfig(method="adakv", budget=6, window_size=2),
        CompressionConfig(method="mask", window_size=2, head_scores=SCORES, mask_ratio=0.25),
    ],
    ids=lambda config: config.method,
)
def test_only_the_rows_of_one_head_change(config: CompressionConfig) -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    (page, *_) = pages(1)
    inputs = family_of(model).build_inputs(processor, [page.image], [page.prompt])

    def kept(used: CompressionConfig) -> torch.Tensor:
        with sparsemm.patch(model, used) as handle:
            generate_greedy(model, inputs, 2)
            return handle.stats.kept_rows[0]

    usual = kept(config)
    with _changed_method(config, usual.double(), None, 4) as same:
        assert torch.equal(kept(same), usual)
    with _changed_method(config, usual.double(), (0, 1), 4) as variant:
        assert variant.method in METHODS
        expected = usual.clone()
        expected[0, 1] = 4
        assert torch.equal(kept(variant), expected)
    with _changed_method(config, usual.double(), (1, 0), 10**6) as variant:
        assert int(kept(variant)[1, 0]) == inputs["input_ids"].shape[1]
    assert "head_rows" not in METHODS


def test_default_rows_and_chosen_heads() -> None:
    results = experiment(SNAP, heads=[(1, 1)])
    assert [run.key for run in results.runs] == [(None, None), (1, 1)]
    assert results.runs[1].rows == 6 and results.runs[1].usual_rows == 6.0
    assert results.runs[1].accuracy == results.runs[0].accuracy
    assert torch.equal(changes(results).isnan(), torch.tensor([[True, True], [True, False]]))


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows=1 is smaller than window_size=2"):
        experiment(rows=1)
    with pytest.raises(ConfigError, match="kv head 2-0"):
        experiment(heads=[(2, 0)])
    with pytest.raises(DataError, match="unchanged"):
        changes(HeadRowsResults({"shape": [2, 2]}))
    with pytest.raises(DataError, match="'sums'"):
        changes(experiment(heads=[(0, 0)]), "sums")


def test_results_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    expected = experiment(output=whole)
    original, calls = PageReader.read, []

    def counting(reader, config, tokens):
        if len(calls) == 3:
            raise KeyboardInterrupt
        if config.method == "head_rows":
            calls.append(config)
        return original(reader, config, tokens)

    monkeypatch.setattr(PageReader, "read", counting)
    with pytest.raises(KeyboardInterrupt):
        experiment(output=parts)
    assert len(HeadRowsResults.load(parts).runs) == 3 and "head_rows" not in METHODS
    calls.clear()
    assert experiment(output=parts).runs == expected.runs and len(calls) == 2
    assert json.loads(parts.read_text())["runs"] == json.loads(whole.read_text())["runs"]
    with pytest.raises(DataError, match="rows: 2 there, 3 here"):
        experiment(output=parts, rows=3)
    settings = HeadRowsResults.load(parts).settings
    assert settings["config"]["method"] == "fullkv" and settings["environment"]["torch"] and settings["weights"]


def test_table_and_map(tmp_path: Path) -> None:
    results = experiment()
    lines = format_head_rows(results, SCORES, most=3).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 1 + 3 and len({len(line) for line in table}) == 1
    largest = min(results.runs[1:], key=lambda run: min(run.mean("accuracy", task) for task in run.tasks))
    assert f"{largest.layer}-{largest.head}" in table[3]
    kv_scores = SCORES.values.view(2, 2, 2).sum(-1) / SCORES.values.sum()
    assert f"{100 * kv_scores[largest.layer, largest.head]:.1f} %" in table[3]
    assert any("rank correlation" in line for line in lines)
    assert "rank correlation" not in format_head_rows(results)
    maps = {task: changes(results, task) for task in results.base.tasks}
    save_figure(draw_head_rows(maps, title="toy"), tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size[0] > 800
    part = draw_head_rows({"read": changes(experiment(heads=[(0, 1)]), "read")})
    assert len(part.axes[0].texts) == 1, "heads that were not changed are empty"


def test_rank_correlation() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    # By hand: ranks 0 1 2 3 against 0.5 0.5 2 3, covariance 4.5, squares 5 and 4.5.
    tied = rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 1, 2, 3]))
    assert tied == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert math.isnan(rank_correlation(values, torch.ones(4)))

"""The masking experiment on a toy model: which heads go, what is written, what is taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from toy_models import toy_model, toy_processor
from toy_pages import SCORES, pages

import sparsemm
from sparsemm import CompressionConfig
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError, DataError, HeadScoreError
from sparsemm.experiments.masking import (
    MaskedRun,
    MaskingResults,
    _configs,
    format_masking,
    heads_of_shares,
    masking_experiment,
    summarise,
)
from sparsemm.experiments.session import PageReader
from sparsemm.models import family_of
from sparsemm.plan import Plan
from sparsemm.runs.metrics import character_accuracy
from sparsemm.runs.plots import save_figure
from sparsemm.viz.heads import draw_masking


def page_reader(model_options: dict | None = None, **how) -> PageReader:
    model = toy_model("qwen2-vl", **(model_options or {}))
    return PageReader(model, toy_processor("qwen2-vl"), pages(), **{"max_new_tokens": 8, "progress": False, **how})


def experiment(*, output: Path | None = None, fresh: bool = False, **options) -> list[MaskedRun]:
    settings: dict = {"num_heads": (0, 1, 3), "seeds": (0, 1), **options}
    return masking_experiment(page_reader(output=output, fresh=fresh), SCORES, **settings)


def test_runs_equal_generation_with_the_same_heads_masked() -> None:
    runs = experiment()
    assert [run.key for run in runs] == [
        ("none", 0, None), ("visual", 1, None), ("random", 1, 0), ("random", 1, 1),
        ("visual", 3, None), ("random", 3, 0), ("random", 3, 1),
    ]  # fmt: skip
    assert runs[0].accuracy == 1.0 and runs[0].exact_match == 1.0
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    (visual,) = [run for run in runs if run.key == ("visual", 3, None)]
    config = CompressionConfig(method="mask", budget=None, head_scores=SCORES, mask_ratio=3 / 8)
    with sparsemm.patch(model, config):
        accuracies = []
        for page in pages():
            inputs = family_of(model).build_inputs(processor, [page.image], [page.prompt])
            text = processor.tokenizer.decode(generate_greedy(model, inputs, 8)[0][0], skip_special_tokens=True)
            accuracies.append(character_accuracy(text, page.answer))
    assert visual.accuracy == pytest.approx(sum(accuracies) / 3) and visual.accuracy < 1.0
    assert visual.mean("accuracy", "field") == pytest.approx((accuracies[0] + accuracies[2]) / 2)
    assert visual.documents_of("accuracy", "read") == [accuracies[1]] and visual.tasks == ["field", "read"]
    assert visual.share == 3 / 8


def test_visual_heads_are_the_highest_scores_and_random_ones_lie_outside() -> None:
    configs = _configs(SCORES, (0, 1, 2, 3, 4), range(20), "zero_query")
    top = SCORES.values.flatten().argsort(descending=True).tolist()
    drawn = {}
    for (kind, count, seed), config in configs.items():
        masked = set(Plan(config, 2, 4, 4).masked_heads.flatten().nonzero().flatten().tolist())
        assert len(masked) == count
        if kind == "visual":
            assert masked == set(top[:count])
        elif kind == "random":
            assert not masked & set(top[:count])
            drawn[count, seed] = frozenset(masked)
    assert len({drawn[1, seed] for seed in range(20)}) > 3, "seeds choose different heads"


def test_shares_and_impossible_numbers() -> None:
    assert heads_of_shares([0, 0.01, 0.02, 0.05, 0.1, 0.2], 1024) == [0, 10, 20, 51, 102, 204]
    assert heads_of_shares([0.29], 100) == [29]
    assert heads_of_shares([0, 0.01, 0.02], 32) == [0]  # less than one head is none, and none is measured once
    with pytest.raises(ConfigError, match="1.5"):
        heads_of_shares([1.5], 8)
    with pytest.raises(ConfigError, match="9 heads"):
        experiment(num_heads=(9,))
    with pytest.raises(ConfigError, match="outside"):
        experiment(num_heads=(5,))
    assert len(experiment(num_heads=(5,), seeds=())) == 1
    with pytest.raises(ConfigError, match="mask_mode"):
        experiment(mask_mode="cut")
    with pytest.raises(DataError, match="no page"):
        PageReader(toy_model("qwen2-vl"), None, [])
    with pytest.raises(HeadScoreError):
        masking_experiment(page_reader({"num_layers": 3}), SCORES)


def test_results_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    expected = experiment(output=whole)
    calls = []
    original = PageReader.read

    def counting(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(args[1])
        return original(*args)

    monkeypatch.setattr(PageReader, "read", counting)
    with pytest.raises(KeyboardInterrupt):
        experiment(output=parts)
    assert len(MaskingResults.load(parts).runs) == 4
    monkeypatch.setattr(PageReader, "read", original)
    assert experiment(output=parts) == expected
    assert json.loads(parts.read_text())["runs"] == json.loads(whole.read_text())["runs"]
    with pytest.raises(DataError, match="mask_mode"):
        experiment(output=parts, mask_mode="zero_output")
    assert len(experiment(output=parts, mask_mode="zero_output", fresh=True)) == 7
    settings = MaskingResults.load(parts).settings
    assert settings["mask_mode"] == "zero_output" and settings["documents"] == 3 and settings["weights"]
    parts.write_text("{}")
    with pytest.raises(DataError, match="no result file"):
        MaskingResults.load(parts)


def by_hand() -> list[MaskedRun]:
    def run(kind: str, count: int, seed: int | None, accuracy: float) -> MaskedRun:
        means = dict(accuracy=accuracy, exact_match=accuracy / 2, anls=accuracy)
        scores = {"read/1 words": {"accuracy": [accuracy - 0.1, accuracy + 0.1], "exact_match": [0.0], "anls": [0.0]}}
        return MaskedRun(kind, count, count / 32, seed, **means, scores=scores)

    return [
        run("none", 0, None, 0.9), run("visual", 2, None, 0.4), run("random", 2, 0, 0.8), run("random", 2, 1, 0.6),
        run("visual", 4, None, 0.1),
    ]  # fmt: skip


def test_table_and_plot(tmp_path: Path) -> None:
    rows = summarise(by_hand())
    assert [row["visual"] for row in rows] == [0.9, 0.4, 0.1]
    assert rows[1]["mean"] == pytest.approx(0.7) and rows[1]["std"] == pytest.approx(0.1 * 2**0.5)
    assert (rows[1]["low"], rows[1]["high"], rows[1]["seeds"]) == (0.6, 0.8, 2)
    assert rows[2]["mean"] is None
    assert [row["visual_error"] for row in rows] == pytest.approx([0.1] * 3)  # sample deviation 0.1 * 2**0.5, of two
    lines = format_masking(by_hand()).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert "6.2 %" in lines[3] and "0.700 ± 0.141" in lines[3] and "0.600–0.800" in lines[3] and "0.350" in lines[3]
    save_figure(draw_masking(rows, title="toy"), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 800
    with pytest.raises(ConfigError, match="speed"):
        summarise(by_hand(), "speed")
    with pytest.raises(DataError, match="no run"):
        draw_masking([])

"""The command-line program on an untrained miniature saved to disk: output, errors, files."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import sparsemm.cli.common as common
from sparsemm.cli import app
from sparsemm.cli.options import Settings
from sparsemm.head_scores import HeadScores
from sparsemm.models import family_of, load_model


def commands(app: typer.Typer) -> list[list[str]]:
    """Every command and group of commands, found by walking the program."""

    def walk(command: Any, path: list[str]) -> Iterator[list[str]]:
        yield path
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, [*path, name])

    return list(walk(typer.main.get_command(app), []))


@pytest.mark.parametrize("command", commands(app), ids=" ".join)
def test_every_command_explains_itself_in_whole_sentences(run: Any, command: list[str]) -> None:
    outcome = run(*command, "--help")
    assert outcome.status == 0
    assert "Usage: sparsemm" in outcome.out
    _, _, listing = outcome.out.partition("\nCommands:\n")
    assert "..." not in listing and "…" not in listing
    sentences = re.split(r"\n  (?=\S)", listing.strip())
    assert not listing or all(sentence.endswith((".", "]")) for sentence in sentences), listing


def test_help_imports_no_torch() -> None:
    code = "import sys, sparsemm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generate_prints_what_the_library_generates(run: Any, files: dict[str, Path]) -> None:
    arguments = ["--model", files["model"], "--image", files["image"], "--max-new-tokens", 8]
    model, processor = load_model(files["model"])
    inputs = family_of(model).build_inputs(processor, [files["image"]], ["What is the date?"])
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    outcome = run("generate", *arguments, "--prompt", "What is the date?", "--method", "fullkv")
    assert outcome.status == 0 and outcome.out.strip() == text
    assert "[fullkv]" in outcome.err and "100 %" not in outcome.out
    for option in ("--stream", "--exact-prompt"):
        other = run("generate", *arguments, "--prompt", "What is the date?", "--method", "fullkv", option)
        assert other.out.strip() == text


def test_generate_samples_when_asked(run: Any, files: dict[str, Path]) -> None:
    arguments = ("generate", "--model", files["model"], "--image", files["image"], "--max-new-tokens", 8, "--method")
    options = ("fullkv", "--temperature", 2.0, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed")
    first, again, other = (run(*arguments, *options, seed) for seed in (1, 1, 2))
    assert first.status == 0 and first.out == again.out
    assert first.out != other.out
    refused = run(*arguments, "fullkv", "--device", "cpu", "--graph")
    assert refused.status == 2 and "not on a GPU" in refused.err
    assert run(*arguments, "fullkv", "--top-p", 1.5).status == 2


def test_generate_as_json_carries_figures_and_settings(run: Any, files: dict[str, Path]) -> None:
    outcome = run(
        *("generate", "--model", files["model"], "--image", files["image"], "--max-new-tokens", 4, "--json"),
        *("--budget", 40, "--head-scores", files["scores"], "--window-size", 8, "--ratio", 0.5),
    )
    report = json.loads(outcome.out)
    assert report["nominal_budget"] == 40 and report["effective_budget"] == 40.0
    assert report["prompt_tokens"] > 196 and report["cache_bytes"] < report["full_cache_bytes"]
    settings = report["config"]
    assert (settings["method"], settings["window_size"], settings["ratio"]) == ("sparsemm", 8, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "snapkw", "--budget", "64"], "'snapkw' is unknown"),
        (["--method", "snapkv", "--budget", "2"], "--budget 2 is smaller than --window-size 32"),
        (["--budget", "64"], "there are no head scores of toy"),
        (["--budget", "64", "--head-scores", "missing.json"], "missing.json does not exist"),
        (["--method", "fullkv", "--image", "missing.png"], "missing.png does not exist"),
        (["--method", "fullkv", "--model", "missing/folder/here"], "missing/folder/here is no folder"),
        (["--method", "fullkv", "--dtype", "float99"], "float99"),
    ],
)
def test_errors_are_one_line_and_status_two(
    run: Any, files: dict[str, Path], arguments: list[str], message: str
) -> None:
    outcome = run("generate", "--model", files["model"], "--image", files["image"], *arguments)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


def test_evaluate_writes_table_results_and_plot(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        *("evaluate", "--model", files["model"], "--head-scores", files["scores"], "--no-progress"),
        *("--methods", "fullkv sparsemm vl_cache", "--budgets", "16, 24", "--window-size", 4),
        *("--documents", 2, "--tasks", "read", "--num-words", "1", "--max-new-tokens", 3, "--output", "measured"),
    ]
    outcome = run(*arguments)
    assert outcome.status == 0
    results = json.loads((tmp_path / "measured" / "results.json").read_text())
    assert [(cell["method"], cell["nominal_budget"]) for cell in results["cells"]] == [
        ("fullkv", None),
        ("sparsemm", 16),
        ("sparsemm", 24),
        ("vl_cache", 16),
        ("vl_cache", 24),
    ]
    assert (tmp_path / "measured" / "accuracy.png").stat().st_size > 1000
    table = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    again = run("report", "measured/results.json", "--plot", "measured/anls.svg", "--metric", "anls")
    assert [line for line in again.out.splitlines() if line.startswith("|")] == table
    assert (tmp_path / "measured" / "anls.svg").read_text().lstrip().startswith("<?xml")
    accuracy = (tmp_path / "measured" / "accuracy.png").read_bytes()
    part = run("report", "measured/results.json", "--metric", "anls", "--task", "read/1 words")
    assert "plot:    measured/anls-read_1_words.png\n" in part.out
    assert (tmp_path / "measured" / "anls-read_1_words.png").exists() and "ANLS: read/1 words" in part.out
    assert (tmp_path / "measured" / "accuracy.png").read_bytes() == accuracy
    paired = run("report", "measured/results.json", "--pair", "sparsemm")
    assert "all rows" in paired.out and "paired difference" in paired.out
    assert "sparsemm: best in " in paired.out and " of 2 cells" in paired.out
    assert run("report", "measured/results.json", "--pair", "adakv").status == 2
    assert run("report", "measured/results.json", "--task", "sums").status == 2
    refused = run(*arguments, "--ratio", 0.7)
    assert refused.status == 2 and "--fresh" in refused.err


def test_quickstart_runs_from_score_file_to_plot(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    outcome = run(
        *("quickstart", "--model", files["model"], "--head-scores", files["scores"], "--documents", 2),
        *("--methods", "fullkv,snapkv,mask", "--budgets", "48", "--mask-ratio", 0.2, "--no-progress"),
    )
    assert outcome.status == 0
    folder = tmp_path / "results" / "quickstart"
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.png", "page.png", "results.json"]
    assert f"sparsemm generate --model {files['model']} --image" in outcome.out
    missing = run("quickstart", "--model", files["model"])
    assert missing.status == 2 and "`sparsemm chase --model" in missing.err


def test_chase_hands_the_library_what_was_asked_for(
    run: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(model: Any, processor: Any, pages: Any, **settings: Any) -> HeadScores:
        seen.update(settings, pages=len(pages), words=[len(page.words) for page in pages])
        return HeadScores(torch.ones(2, 4))

    monkeypatch.setattr(importlib.import_module("sparsemm.chase"), "chase", fake)
    outcome = run(
        "chase",
        "--model",
        files["model"],
        "--dataset",
        "miniature",
        "--num-images",
        3,
        "--num-words",
        "2 3",
        "--match",
        "aligned",
        "--fresh",
    )
    assert outcome.status == 0 and "2 layers x 4 query heads" in outcome.out
    assert seen["pages"] == 3 and seen["words"] == [2, 3, 2]
    assert seen["match"] == "aligned" and seen["resume"] is False
    assert seen["output"] == files["model"] / "head_scores.json"


def test_head_scores_show_convert_compare(run: Any, tmp_path: Path) -> None:
    release = {f"{layer}-{head}": [float(layer == 1 and head == 2)] * 2 for layer in range(2) for head in range(4)}
    (tmp_path / "release.json").write_text(json.dumps(dict(reversed(release.items()))))
    shown = run("head-scores", "show", "release.json", "--top", 1, "--kv-heads", 2)
    assert "2 layers x 4 query heads" in shown.out
    assert "50 % of the score lies in 1 of 8 heads" in shown.out
    assert "    1    2  100.00 %" in shown.out and "    1    0.00 100.00" in shown.out
    converted = run("head-scores", "convert", "release.json", "ours.json", "--model", "toy")
    assert converted.status == 0
    assert HeadScores.load(tmp_path / "ours.json").provenance["model"] == "toy"
    assert torch.equal(
        HeadScores.load(tmp_path / "ours.json").values, HeadScores.load(tmp_path / "release.json").values
    )
    refused = run("head-scores", "convert", "release.json", "ours.json")
    assert refused.status == 2 and "--force" in refused.err
    HeadScores(torch.tensor([[3.0, 0, 0, 0], [1.0, 0, 0, 0]])).save(tmp_path / "other.json")
    compared = run("head-scores", "compare", "ours.json", "other.json", "--fraction", 0.25)
    assert "total variation distance:      1.000" in compared.out and "heads in both top 2:          1" in compared.out
    same = run("head-scores", "compare", "ours.json", "ours.json")
    assert "ranks: 1.000" in same.out and "heads in both top 1:          1" in same.out


def test_names_and_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "checkout", lambda: tmp_path)
    folder = tmp_path / "assets" / "miniatures" / "qwen2-vl"
    with pytest.raises(common.DataError, match="sparsemm miniatures train --family qwen2-vl"):
        common.resolve_model("qwen2-vl")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert common.resolve_model("qwen2-vl") == str(folder)
    assert common.resolve_model("org/model") == "org/model"
    windows = [Settings(window_size=given).fields(name)["window_size"] for name, given in (
        ("qwen2-vl", None), (str(folder), None), ("org/model", None), ("qwen2-vl", 7),
    )]  # fmt: skip
    assert windows == [4, 4, 32, 7]
    assert common.parse_list(" a, b  c,") == ["a", "b", "c"]
    with pytest.raises(common.ConfigError, match="--budgets holds '8x'"):
        common.parse_integers("4 8x", "--budgets")


def test_calibrate_writes_a_file_that_the_other_commands_find(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    entries = [{"image": str(files["image"].name), "question": "What is the date?", "answer": "may", "task": "field"}]
    source = tmp_path / "pages"
    source.mkdir()
    (source / files["image"].name).write_bytes(files["image"].read_bytes())
    (source / "questions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    model = ["--model", files["model"]]
    assert "--data" in run("calibrate", *model, "--no-progress").err
    asked = [*model, "--image", files["image"], "--method", "rate_distortion", "--budget", 8, "--max-new-tokens", 2]
    asked += ["--window-size", 4]
    assert "there is no calibration of toy" in run("generate", *asked).err
    outcome = run("calibrate", *model, "--data", source, "--window-size", 4, "--no-progress")
    assert outcome.status == 0 and "1 pages used (1 field), 0 skipped" in outcome.out, outcome.err
    place = files["model"] / "calibration.json"
    scores = HeadScores.load(place)
    assert scores.curves.rows[0] == 4 and scores.provenance["dataset"] == "pages"
    found = run("generate", *asked)
    assert found.status == 0 and "(toy, 1 pages)" in found.err and "[rate_distortion] 8.00 of" in found.err
    plain = run("generate", *asked, "--head-scores", files["scores"])  # serves other methods: the model's is taken
    assert plain.out == found.out and str(place) in plain.err
    place.unlink()
    for file, message in [
        (tmp_path / "none.json", "none.json does not exist"),
        (files["scores"], "toy.json holds plain scores, and there is no calibration of toy"),
        (common.checkout() / "head_scores" / "calibrations" / "qwen2-vl.json", "were chased on qwen2-vl"),
    ]:
        refused = run("generate", *asked, "--head-scores", file)
        assert refused.status == 2 and message in refused.err

"""The commands around chasing: data sets, the chase itself, masking, pictures, on an untrained miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsemm.datasets import open_pages
from sparsemm.experiments.head_rows import HeadRowsResults
from sparsemm.experiments.masking import MaskingResults
from sparsemm.head_scores import HeadScores


def test_pages_are_converted_and_chased(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    made = run("data", "convert", "documents", "pages", "--num-images", 2, "--page-size", "96x128", "--unit", "word")
    assert made.status == 0 and "pages: 2 pages" in made.out
    pages = open_pages(tmp_path / "pages")
    assert [page.image.size for page in pages] == [(96, 128)] * 2
    again = run("data", "convert", "pages", "quads", "--to", "mlt")
    assert again.status == 0 and len(list((tmp_path / "quads").glob("gt_*.txt"))) == 2

    # An untrained model reads nothing that matches: every box of the whole page, and every character in its text.
    entries = json.loads((tmp_path / "pages" / "boxes.json").read_text())
    for entry in entries["images"]:
        text = "abcdefghijklmnopqrstuvwxyz0123456789 user assistant"
        entry["words"] = [{"text": text, "box": [0, 0, 95, 127]}]
    (tmp_path / "pages" / "boxes.json").write_text(json.dumps(entries))
    chased = run(
        "chase", "--model", files["model"], "--dataset", "pages", "--match", "unique", "--max-new-tokens", 4,
        "--output", "scores.json", "--no-progress",
    )  # fmt: skip
    assert chased.status == 0, chased.err
    assert "2 images read, 0 skipped" in chased.out
    provenance = HeadScores.load(tmp_path / "scores.json").provenance
    assert provenance["dataset"] == "pages" and provenance["num_kv_heads"] == 2 and provenance["match_rule"] == "unique"
    shown = run("head-scores", "show", "scores.json")
    assert "80 % of the score lies in" in shown.out and "top  5 % of the heads" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "convert", "nowhere", "out"], "does not exist"),
        (["data", "convert", "documents", "out", "--page-size", "large"], "--page-size 'large'"),
        (["data", "convert", "miniature", "out", "--unit", "line"], "--unit 'line'"),
        (["chase", "--model", "toy", "--dataset", "nowhere"], "nowhere does not exist"),
        (["viz", "scores", "no.json"], "does not exist"),
        (["viz", "attention", "--model", "toy", "--image", "no.png"], "no.png does not exist"),
        (["viz", "all", "--model", "toy"], "no head scores of toy"),
        (["mask", "--model", "toy"], "no head scores of toy"),
        (["mask", "--heads", "1", "--shares", "2"], "not both"),
    ],
)
def test_errors_are_one_line_and_status_two(run: Any, arguments: list[str], message: str) -> None:  # noqa: F811
    outcome = run(*arguments)
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


def test_masking_prints_a_table(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    arguments = ["mask", "--model", files["model"], "--head-scores", files["scores"], "--documents", 2]
    arguments += ["--seeds", "0 1", "--max-new-tokens", 3, "--output", "masking", "--no-progress"]
    outcome = run(*arguments, "--heads", "0 1 2")
    assert outcome.status == 0, outcome.err
    table = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and "12.5 %" in table[3] and "25.0 %" in table[4]
    assert (tmp_path / "masking" / "masking.png").stat().st_size > 10_000
    assert len(MaskingResults.load(tmp_path / "masking" / "masking.json").runs) == 7
    shares = run(*arguments, "--shares", "0,12.5,25")
    assert [line for line in shares.out.splitlines() if line.startswith("|")] == table  # the same runs, done already


def test_head_rows_prints_a_table(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    arguments = ["head-rows", "--model", files["model"], "--head-scores", files["scores"], "--documents", 2]
    arguments += ["--max-new-tokens", 3, "--window-size", 4, "--no-progress"]
    outcome = run(*arguments, "--heads", "0-1,1-0", "--output", "full.json")
    assert outcome.status == 0, outcome.err
    table = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.split()[1] for line in table[3:]} == {"0-1", "1-0"}
    assert (tmp_path / "full.png").stat().st_size > 10_000
    under = run(*arguments, "--method", "sparsemm", "--budget", 8, "--rows", 9)
    assert under.status == 0, under.err
    stored = HeadRowsResults.load(tmp_path / "results" / "head_rows" / f"{files['model'].name}-sparsemm-8.json")
    assert {run.rows for run in stored.runs[1:]} == {9} and stored.settings["config"]["budget"] == 8
    assert run(*arguments, "--heads", "7-0").status == 2


def test_all_pictures_of_a_model(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    outcome = run(
        "viz", "all", "--model", files["model"], "--head-scores", files["scores"], "--image", files["image"],
        "--window-size", 4, "--max-new-tokens", 3, "--top", 2, "--bottom", 1, "--output", "pictures",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {
        "attention.html", "attention.png", "budgets.png", "head_scores.png", "kept.png", "sparsity.png", "summary.png",
    }  # fmt: skip
    assert all(name in outcome.out for name in names)


def test_single_pictures(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    model = ["--model", files["model"], "--image", files["image"]]
    scores = ["--head-scores", files["scores"]]
    for arguments in (
        ["scores", files["scores"], "--kv-heads", 2, "--output", "a.png"],
        ["sparsity", files["scores"], files["scores"], "--output", "b.svg"],
        [
            "attention",
            *model,
            *scores,
            "--tokens",
            "mean,0",
            "--heads",
            "1-3",
            "--max-new-tokens",
            2,
            "--output",
            "c.png",
        ],
        ["summary", *model, *scores, "--budget", 12, "--window-size", 4, "--max-new-tokens", 2, "--output", "g.png"],
        ["page", *model, "--heads", "0-0 1-1", "--max-new-tokens", 2, "--output", "d.html"],
        ["calibration", *model[:2], "--head-scores", files["calibration"], "--heads", "1-3", "--output", "h.png"],
        ["budgets", *model, "--method", "adakv", "--budget", 12, "--window-size", 4, "--output", "e.png"],
        ["kept", *model, "--method", "snapkv", "--budget", 12, "--window-size", 4, "--output", "f.png"],
    ):
        outcome = run("viz", *arguments)
        assert outcome.status == 0, outcome.err
        assert (tmp_path / str(arguments[-1])).stat().st_size > 1000


def test_pictures_are_called_by_what_they_show(run: Any, files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    model = ["--model", files["model"], "--image", files["image"], "--window-size", 4]
    for options, name in (
        (["--method", "snapkv", "--budget", 12], "budgets-toy-page-snapkv-12.png"),
        (["--method", "snapkv", "--budget", 16], "budgets-toy-page-snapkv-16.png"),
        (
            ["--method", "adakv", "--budget", 12, "--prompt", "Who? What/why?"],
            "budgets-toy-page-Who_What_why-adakv-12.png",
        ),
    ):
        outcome = run("viz", "budgets", *model, *options)
        assert outcome.out == f"{name}\n", outcome.err
    assert len(list(tmp_path.glob("*.png"))) == 3
    outcome = run(
        *("viz", "all", *model, "--head-scores", files["scores"], "--budget", 16, "--max-new-tokens", 2),
        *("--top", 1, "--bottom", 1),
    )
    assert outcome.status == 0, outcome.err
    assert [path.name for path in (tmp_path / "results" / "viz" / "toy").iterdir()] == ["page-sparsemm-16"]

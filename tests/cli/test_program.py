"""The program around its commands: where it writes, how it ends, what its messages name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsemm.cli import data, evaluate
from sparsemm.cli.common import warn_of_positions
from sparsemm.cli.outputs import claim, claim_folder, settle
from sparsemm.errors import ConfigError, DataError
from sparsemm.io import write_bytes_atomic
from sparsemm.models import load_model


def test_places_to_write_are_made_sure_of_and_tidied_up(tmp_path: Path) -> None:
    claim(tmp_path / "a" / "b" / "file.json", None)
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    settle()
    assert not (tmp_path / "a").exists()
    claim(tmp_path / "a" / "b" / "file.json")
    (tmp_path / "a" / "kept").write_text("by somebody")
    settle()
    assert not (tmp_path / "a" / "b").exists() and (tmp_path / "a" / "kept").exists()
    claim_folder(tmp_path / "c")
    (tmp_path / "c" / "result").write_text("by the command")
    settle()
    assert (tmp_path / "c" / "result").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        claim(tmp_path)
    for blocked in (tmp_path / "a" / "kept" / "below", Path("/proc/nowhere/file")):
        with pytest.raises(ConfigError, match="nothing can be written"):
            claim(blocked / "file")
    claim(Path(os.devnull))


def test_devices_are_written_to_and_links_are_followed(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_bytes_atomic(tmp_path / "pipe", b"data")
    assert os.read(reader, 10) == b"data" and (tmp_path / "pipe").is_fifo()
    for descriptor in (read, write, reader):
        os.close(descriptor)
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_bytes_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


def test_an_output_is_refused_before_a_model_is_loaded(
    run: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsemm.load_model", lambda *a, **k: pytest.fail("a model was loaded"), raising=False)
    (tmp_path / "file").write_text("")
    for command in (["evaluate"], ["quickstart"], ["mask"], ["chase", "--dataset", "miniature"], ["viz", "all"]):
        outcome = run(
            *command, "--model", files["model"], "--output", "file/below/x",
            *([] if command[0] == "chase" else ["--head-scores", files["scores"]]),
        )  # fmt: skip
        assert outcome.status == 2 and outcome.err.splitlines()[-1].startswith("error: nothing can be written"), command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("two\nlines"), 2, "error: two lines"),
        (ConfigError("seed=-1 is too small"), 2, "error: --seed -1 is too small"),
        (OSError(28, "No space left on device", "results.json"), 2, "error: results.json: No space left on device"),
        (RuntimeError("not foreseen"), 1, "error: RuntimeError: not foreseen (--verbose shows where)"),
    ],
)
def test_errors_end_in_one_line_and_a_traceback_only_when_asked(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    line: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(data.Source, "open", fail)
    outcome = run("data", "convert", "documents", "new")
    assert (outcome.status, outcome.err) == (status, line + "\n")
    assert not caplog.records
    error.args = error.args  # the same error again, this time shown
    assert run("--verbose", "data", "convert", "documents", "new").status == status
    assert any(record.exc_info for record in caplog.records)
    assert not Path("new").exists()


def test_an_interrupted_command_says_that_it_goes_on(
    run: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_evaluate", interrupt)
    outcome = run("evaluate", "--model", files["model"], "--head-scores", files["scores"])
    assert outcome.status == 130 and outcome.err.endswith("interrupted; the same command goes on where it stopped\n")


@pytest.mark.parametrize("broken", ["no tokenizer", "half a tokenizer"])
def test_a_checkpoint_without_its_tokenizer_is_refused(broken: str, files: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(files["model"], tmp_path / "copy")
    if broken == "no tokenizer":
        for file in copy.glob("tokenizer*"):
            file.unlink()
    else:
        (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text()[:300])
    with pytest.raises(DataError, match="holds no tokenizer" if broken == "no tokenizer" else "damaged"):
        load_model(copy)


def test_images_and_prompts_that_the_processor_refuses(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4000, 10)).save(tmp_path / "ribbon.png")
    arguments = ("generate", "--model", files["model"], "--method", "fullkv", "--max-new-tokens", 1, "--image")
    for options, reason in (
        ([files["image"], "--prompt", "what is <|image_pad|>?"], "2 <|image_pad|> tokens"),
        (["ribbon.png"], "aspect ratio"),
    ):
        outcome = run(*arguments, *options)
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and reason in outcome.err


def test_generate_has_a_budget_of_its_own(run: Any, files: dict[str, Path]) -> None:
    arguments = ("generate", "--model", files["model"], "--image", files["image"], "--max-new-tokens", 1, "--json")
    outcome = run(*arguments, "--method", "snapkv")
    assert json.loads(outcome.out)["nominal_budget"] == 256


def test_more_tokens_than_positions_are_warned_about(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(files["model"])
    known = model.config.get_text_config().max_position_embeddings
    capsys.readouterr()
    warn_of_positions(model, known)
    assert capsys.readouterr().err == ""
    warn_of_positions(model, known + 1)
    assert f"{known + 1} tokens are more than the {known} positions" in capsys.readouterr().err


def test_shapes_of_7b_are_warned_about_on_a_cpu(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any, **options: Any) -> None:
        raise DataError("stop")

    monkeypatch.setattr("sparsemm.bench.shapes.random_model", stop)
    for shape, warned in (("vicuna-7b", True), ("tiny", False)):
        outcome = run("bench", "e2e", "--model", shape, "--device", "cpu")
        assert outcome.status == 2 and outcome.err.endswith("error: stop\n")
        assert (f"warning: {shape} on a CPU fills tens of gigabytes" in outcome.err) == warned


def test_the_figures_of_the_quickstart_follow_from_its_json(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    outcome = run(
        *("quickstart", "--model", files["model"], "--head-scores", files["scores"], "--documents", 4),
        *("--methods", "fullkv,snapkv,adakv,mask", "--budgets", "40,64", "--max-new-tokens", 3, "--no-progress"),
    )
    assert outcome.status == 0, outcome.err
    lines = [line.strip("|").split("|") for line in outcome.out.splitlines() if line.startswith("|")]
    header, _, *rows = [[part.strip() for part in line] for line in lines]
    cells = json.loads((tmp_path / "results" / "quickstart" / "results.json").read_text())["cells"]
    assert len(rows) == len(cells) == 1 + 2 + 2 + 1
    for row, cell in zip(rows, cells, strict=True):
        shown = dict(zip(header, row, strict=True))
        budget = cell["nominal_budget"]
        assert (shown["method"], shown["budget"]) == (cell["method"], "-" if budget is None else str(budget))
        for heading, metric in (("accuracy", "accuracy"), ("exact match", "exact_match"), ("ANLS", "anls")):
            documents = [value for part in cell["scores"].values() for value in part[metric]]
            assert len(documents) == cell["documents"] == 4
            assert shown[heading] == f"{sum(documents) / 4:.3f}"
        for task in ("read", "field"):
            parts = [part["accuracy"] for name, part in cell["scores"].items() if name.startswith(f"{task}/")]
            values = [value for part in parts for value in part]
            assert shown[f"accuracy: {task}"] == f"{sum(values) / len(values):.3f}"
        assert shown["effective"] == f"{cell['effective_budget']:.2f}"
        # The same prompt and the same new tokens on both sides.
        kept, whole = (rows + cell["new_tokens"] for rows in (cell["effective_budget"], cell["prompt_tokens"]))
        assert shown["% of full"] == f"{100 * kept / whole:.1f}"
        if budget is None:
            assert shown["% of full"] == "100.0"
        elif cell["method"] in ("snapkv", "adakv"):
            assert cell["effective_budget"] == budget

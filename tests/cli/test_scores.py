"""Which score file the commands take: found by one rule, checked against the model, said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsemm.cli.common as common
from sparsemm import CompressionConfig, patch
from sparsemm.cli.options import Scores
from sparsemm.errors import DataError, HeadScoreError
from sparsemm.head_scores import HeadScores
from sparsemm.models import load_model
from sparsemm.models.identity import Identity, checkpoint_identity, digest_of_parameters, identity_of

ROOT = Path(common.__file__).resolve().parents[2]


def table(**provenance: Any) -> HeadScores:
    return HeadScores(torch.arange(1.0, 9.0).view(2, 4), **provenance)


@pytest.fixture
def generate(run: Any, files: dict[str, Path]) -> Any:
    return lambda *options: run(
        *("generate", "--model", files["model"], "--image", files["image"], "--max-new-tokens", 2),
        *("--budget", 40, "--window-size", 8, *options),
    )


# -- the rule that finds them -----------------------------------------------------------------------------------------


def test_scores_are_found_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, checkpoint = tmp_path / "checkout", tmp_path / "elsewhere" / "mine"
    (checkout / "head_scores").mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    monkeypatch.setattr(common, "checkout", lambda: checkout)
    here = tmp_path / "here"
    (here / "head_scores").mkdir(parents=True)
    monkeypatch.chdir(here)
    # What lies under the current folder is nobody's choice.
    table().save(here / "head_scores" / "mine.json")
    assert Scores().file(str(checkpoint)) is None and Scores().file("org/mine") is None
    table().save(checkout / "head_scores" / "mine.json")
    assert Scores().file(str(checkpoint)) == Scores().file("org/mine") == checkout / "head_scores" / "mine.json"
    table().save(checkpoint / "head_scores.json")
    assert Scores().file(str(checkpoint)) == checkpoint / "head_scores.json"
    assert Scores(Path("given.json")).file(str(checkpoint)) == Path("given.json")
    with pytest.raises(DataError, match="other.json.*sparsemm chase --model org/other.*--head-scores"):
        Scores().table("org/other")


def test_a_chase_writes_where_its_scores_are_found(files: dict[str, Path], run: Any, tmp_path: Path) -> None:
    from sparsemm.datasets import convert, open_pages

    convert(open_pages("documents", limit=1, size=96), tmp_path / "pages", "plain", progress=False)
    entries = json.loads((tmp_path / "pages" / "boxes.json").read_text())
    text = "abcdefghijklmnopqrstuvwxyz0123456789 user assistant"
    entries["images"][0]["words"] = [{"text": text, "box": [0, 0, 95, 95]}]
    (tmp_path / "pages" / "boxes.json").write_text(json.dumps(entries))
    model = shutil.copytree(files["model"], tmp_path / "copy")
    chased = run(*("chase", "--model", model, "--dataset", tmp_path / "pages", "--max-new-tokens", 4, "--no-progress"))
    assert chased.status == 0, chased.err
    assert chased.out.startswith(f"{model / 'head_scores.json'}: ")
    used = run("generate", "--model", model, "--image", files["image"], "--max-new-tokens", 2, "--budget", 40)
    assert used.status == 0, used.err
    assert f"head scores: {model / 'head_scores.json'} (copy, 1 images, match rule unique)\n" in used.err


# -- whose they are ---------------------------------------------------------------------------------------------------


def test_scores_of_another_model_are_an_error_that_names_both(generate: Any, tmp_path: Path) -> None:
    table(model="org/other", weights="0123", num_images=7, match_rule="aligned").save(tmp_path / "other.json")
    refused = generate("--head-scores", "other.json")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert "org/other" in refused.err and "toy" in refused.err and "--any-head-scores" in refused.err
    taken = generate("--head-scores", "other.json", "--any-head-scores")
    assert taken.status == 0
    line = "head scores: other.json (org/other, 7 images, match rule aligned); the scores were chased on org/other"
    assert taken.err.startswith(line)


def test_compare_takes_scores_of_one_model(run: Any, tmp_path: Path) -> None:
    table(model="org/other").save(tmp_path / "other.json")
    table(model="toy").save(tmp_path / "toy.json")
    refused = run("head-scores", "compare", "toy.json", "other.json")
    assert refused.status == 2 and "org/other" in refused.err and "toy" in refused.err
    assert run("head-scores", "compare", "toy.json", "other.json", "--any-head-scores").status == 0


def test_other_weights_of_the_same_name_are_a_warning(
    generate: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(model="somewhere/toy", weights="0123").save(tmp_path / "old.json")
    outcome = generate("--head-scores", "old.json")
    assert outcome.status == 0 and "other weights" in outcome.err
    assert any("other weights" in record.message for record in caplog.records)


def test_equal_weights_are_the_same_model_whatever_the_name(
    generate: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    table(model="renamed", weights=checkpoint_identity(files["model"]).weights).save(tmp_path / "renamed.json")
    outcome = generate("--head-scores", "renamed.json")
    assert outcome.status == 0 and "; " not in outcome.err.splitlines()[0]


def test_files_without_provenance_are_taken_with_a_notice(generate: Any, tmp_path: Path) -> None:
    release = {f"{layer}-{head}": [1.0 + head] for layer in range(2) for head in range(4)}
    (tmp_path / "release.json").write_text(json.dumps(release))
    outcome = generate("--head-scores", "release.json")
    assert outcome.status == 0
    assert outcome.err.startswith("head scores: release.json (unknown model); the file does not say which model")


def test_patch_checks_scores_too(files: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load_model(files["model"])
    table(model="other").save(tmp_path / "other.json")
    with pytest.raises(HeadScoreError, match=r"chased on other, the model is toy.*any_model=True"):
        patch(model, CompressionConfig("mask", head_scores=tmp_path / "other.json"))
    scores = HeadScores.load(tmp_path / "other.json", any_model=True)
    with patch(model, CompressionConfig("mask", head_scores=scores)):
        pass


# -- digests ----------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_files(files: dict[str, Path], tmp_path: Path) -> None:
    whole = checkpoint_identity(files["model"])
    assert whole == identity_of(load_model(files["model"])[0])
    assert whole == identity_of(load_model(files["model"], dtype="bfloat16")[0])
    assert whole == identity_of(load_model(files["model"])[0].to("meta"))
    copy = shutil.copytree(files["model"], tmp_path / "other-name")
    assert checkpoint_identity(copy) == Identity("other-name", whole.weights)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert checkpoint_identity(copy).weights != whole.weights
    assert checkpoint_identity("org/name-that-is-not-in-the-cache") == Identity(
        "org/name-that-is-not-in-the-cache", None
    )


def test_a_model_built_in_memory_has_no_name(files: dict[str, Path]) -> None:
    model, _ = load_model(files["model"])
    model.config._name_or_path = ""
    identity = identity_of(model)
    assert identity == Identity(None, digest_of_parameters(model))
    assert identity.has_weights_of(checkpoint_identity(files["model"])) is None
    assert "no name" in table(model="toy").check_model(identity)


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm.models.identity._WHOLE_FILE", 1000)
    monkeypatch.setattr("sparsemm.models.identity._BLOCK", 10)
    monkeypatch.setattr("sparsemm.models.identity._NUM_BLOCKS", 5)
    content = bytearray(10_000)
    digests = set()
    for index, place in enumerate((None, 0, 2498, 9_999, 1000)):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(changed)
        digests.add(checkpoint_identity(folder).weights)
    assert len(digests) == 4  # the last one lies between two blocks


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("assets/miniatures/*/config.json")))
def test_committed_scores_belong_to_the_committed_miniatures(name: str) -> None:
    scores = HeadScores.load(ROOT / "head_scores" / f"{name}.json")
    assert scores.identity == checkpoint_identity(ROOT / "assets" / "miniatures" / name)


# -- none ---------------------------------------------------------------------------------------------------------


def test_missing_scores_stop_only_what_needs_them(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", files["model"], "--budgets", "16", "--window-size", 4, "--documents", 1]
    arguments += ["--tasks", "read", "--num-words", "1", "--max-new-tokens", 2, "--output", "out", "--no-progress"]
    outcome = run(*arguments, "--methods", "fullkv,sparsemm,snapkv,mask")
    assert outcome.status == 1
    assert "left out for want of head scores: sparsemm, mask" in outcome.err
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["fullkv", "snapkv"]
    # Plain scores are no calibration: the methods that want one are left out, the others run.
    given = ["--fresh", "--head-scores", files["scores"]]
    plain = run(*arguments, *given, "--methods", "fullkv,mask,rate_distortion")
    assert plain.status == 1 and "left out for want of a calibration: rate_distortion" in plain.err
    assert plain.err.count("head scores: ") == 1
    alone = run(*arguments, "--methods", "sparsemm")
    assert alone.status == 2 and "there are no head scores of toy" in alone.err

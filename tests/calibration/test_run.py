"""Whole calibrations: what the file holds, killed and taken up again, shared by processes, bad files refused."""

from __future__ import annotations

import json
from pathlib import Path

import calibrate_job
import numpy as np
import pytest
from long_jobs import killed_and_resumed, run_here, same_files, shared_by_two
from toy_models import toy_model, toy_processor

from sparsemm import CompressionConfig, HeadScores
from sparsemm.calibration import calibrate, journal_path
from sparsemm.calibration.curves import row_grid
from sparsemm.errors import ConfigError, DataError, HeadScoreError
from sparsemm.plan import head_budgets


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "scores.json"
    run_here(calibrate_job, output)
    return output


def test_the_file_is_the_mean_over_pages_and_tasks(undisturbed: Path) -> None:
    scores = HeadScores.load(undisturbed)
    _, *records = map(json.loads, journal_path(undisturbed).read_text().splitlines())
    assert "truncated file" in records[4]["skipped"]
    used = [record for record in records if "skipped" not in record]
    tasks = [[each for each in used if each["task"] == task] for task in ("field", "read")]
    assert [len(task) for task in tasks] == [2, 3] and scores.provenance["tasks"] == {"field": 2, "read": 3}
    gradients = [np.array([each["gradients"] for each in task]) for task in tasks]
    sensitivities = sum(np.abs(task).mean(0) for task in gradients) / 2
    plain = np.maximum(0, -sum(task.mean(0) for task in gradients) / 2)
    longest = max(each["prompt_tokens"] for each in used)
    rows = row_grid(4, longest)
    for name in ("distortions", "distortions_mixkv"):
        lost = np.zeros((*sensitivities.shape, len(rows)))
        for task in tasks:
            for each in task:
                curves = np.array(each[name])
                lost[..., : curves.shape[-1]] += curves / len(task) / 2
        np.testing.assert_allclose(getattr(scores.curves, name), lost / lost[..., :1], rtol=1e-12)
    np.testing.assert_allclose(scores.values, plain, rtol=1e-12)
    np.testing.assert_allclose(scores.curves.sensitivities, sensitivities, rtol=1e-12)
    assert scores.curves.rows == rows and (scores.curves.distortions[..., -1] == 0).all()
    figures = scores.provenance
    assert (figures["model"], figures["num_pages"], figures["num_skipped"], figures["window_size"]) == ("toy", 5, 1, 4)
    needles = [np.array(each["retrieval"]) for each in used if each["retrieval"] is not None]
    assert [each["task"] for each in used if each["retrieval"] is not None] == ["field"] * figures["num_needles"]
    assert figures["num_needles"] == 2 and sum(needles).min() > 0
    np.testing.assert_allclose(scores.curves.retrieval, sum(needles) / 2, rtol=1e-12)
    assert records[1]["answer_tokens"] == 6  # no answer given: the model's own, as long as it may be


def test_it_is_a_calibration_of_this_model(undisturbed: Path) -> None:
    config = CompressionConfig("rate_distortion", 9, undisturbed, window_size=4)
    rows = head_budgets(config, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=30)
    assert rows.sum() == 9 * 4 and rows.unique().numel() > 1
    needles = CompressionConfig("head_kv", 9, undisturbed, window_size=4)
    by_needles = head_budgets(needles, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=30)
    plain = CompressionConfig("sparsemm", 9, undisturbed, window_size=4)
    by_scores = head_budgets(plain, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=30)
    assert by_needles.sum() == by_scores.sum() == 9 * 4 and by_scores.unique().numel() > 1
    again = HeadScores.load(undisturbed)
    assert again.describe() == HeadScores.load(undisturbed).describe()
    assert again.describe()["sha256"] != HeadScores(again.values).describe()["sha256"]
    with pytest.raises(HeadScoreError, match="the model has 2 x 8"):
        head_budgets(config, num_layers=2, num_query_heads=8, num_kv_heads=2, prompt_length=30)


def test_a_killed_calibration_goes_on_and_gives_the_same_files(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    killed_and_resumed(calibrate_job, output, journal_path(output))
    same_files((output, undisturbed), (journal_path(output), journal_path(undisturbed)))


def test_two_processes_give_the_files_of_one(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    shared_by_two(calibrate_job, output)
    same_files((output, undisturbed), (journal_path(output), journal_path(undisturbed)))


def test_a_finished_file_is_not_replaced_by_less(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    output.write_bytes(undisturbed.read_bytes())
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    same = {"window_size": 4, "max_new_tokens": 6, "model_name": "toy", "dataset": "noise", "progress": False}
    few = [calibrate_job.SlowQuestion(0), calibrate_job.SlowQuestion(2)]
    again = calibrate(model, processor, few, output=output, **same)
    assert again.provenance["num_pages"] == 5 and output.read_bytes() == undisturbed.read_bytes()
    with pytest.raises(DataError, match="other settings .window_size: 4 there, 5 here"):
        calibrate(model, processor, few, output=output, **{**same, "window_size": 5})
    assert output.read_bytes() == undisturbed.read_bytes()
    fresh = calibrate(model, processor, few, output=output, resume=False, **same)
    assert fresh.provenance["num_pages"] == 2 == HeadScores.load(output).provenance["num_pages"]


def test_bad_settings_and_pages() -> None:
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    for change, message in [
        ({"window_size": 0}, "window_size=0"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"max_new_tokens": 1}, "max_new_tokens=1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            calibrate(model, processor, [], progress=False, **change)
    with pytest.raises(DataError, match="none of 1 pages"):
        calibrate(model, processor, [calibrate_job.SlowQuestion(4)], progress=False)
    with pytest.raises(DataError, match="none of 1 pages"):  # the prompt is no longer than the window
        calibrate(model, processor, [calibrate_job.SlowQuestion(0)], window_size=500, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "no rows"),
        ({"rows": [4, 4, 5]}, "not ascending"),
        ({"rows": [4, 5]}, "do not fit"),
        ({"sensitivities": [[1.0, -1.0]]}, "sensitivities are negative at layer 0, head 1"),
        ({"sensitivities": [[1.0]]}, "do not fit"),
        ({"distortions": [[[1.0, float("inf"), 0.0]] * 2]}, "distortions hold NaN or infinity at layer 0, head 0"),
        ({"distortions": "x"}, "no distortions"),
        ({"distortions_mixkv": [[[1.0, 0.0]] * 2]}, "distortions_mixkv .* do not fit"),
        ({"values": [[1.0, 2.0, 3.0]]}, "curves are of"),
        ({"retrieval": [[1.0]]}, "retrieval scores .* do not fit"),
        ({"retrieval": [[1.0, -2.0]]}, "retrieval are negative"),
    ],
)  # fmt: skip
def test_broken_calibrations_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    document = {
        "format": "sparsemm-calibration", "version": 1, "values": [[1.0, 2.0]], "rows": [4, 5, 6],
        "sensitivities": [[1.0, 2.0]], "distortions": [[[1.0, 0.5, 0.0]] * 2],
    }  # fmt: skip
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(document))
    assert HeadScores.load(path).curves.rows == [4, 5, 6]
    path.write_text(json.dumps({**document, **change}))
    with pytest.raises(HeadScoreError, match=message):
        HeadScores.load(path)

"""The lmms-eval plug-in: registration, answers, cells that resume and fail, runs on local copies of benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_copies import COPIES, load_dataset, picture
from toy_models import toy_model, toy_processor

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (make install does it)")
pytest.importorskip("sparsemm_lmms_eval", reason="the plug-in is not installed (make install does it)")

from sparsemm_lmms_eval import TASKS_FOLDER, grid, runner  # noqa: E402
from sparsemm_lmms_eval.__main__ import app  # noqa: E402

from sparsemm import HeadScores  # noqa: E402
from sparsemm.cli.common import WIDE
from sparsemm.cli.program import run_program as run_program_of  # noqa: E402
from sparsemm.errors import ConfigError, UnsupportedModelError  # noqa: E402
from sparsemm.head_scores import Curves  # noqa: E402
from sparsemm.tables import read_measurements  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"batch_size": 4, "device": "cpu"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Qwen2-VL and a toy LLaVA-NeXT as folders, and head scores for both."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in ("qwen2-vl", "llava-mistral"):
        toy_model(family).save_pretrained(folder / family)
        toy_processor(family).save_pretrained(folder / family)
    HeadScores(torch.rand(2, 4, generator=torch.Generator().manual_seed(0))).save(folder / "scores.json")
    return folder


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets.config

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def shared(checkpoints: Path, family: str = "qwen2-vl", **changes: Any) -> grid.Shared:
    defaults = {"window_size": 4, "rounding": "exact", "head_scores": checkpoints / "scores.json"}
    limit, loading = changes.pop("limit", 5), changes.pop("loading", QUIET)
    return grid.Shared(str(checkpoints / family), grid.TableSettings(**{**defaults, **changes}), limit, loading)


def run_program(command: list[str], folder: Path, **variables: str) -> str:
    """What a program prints; when it takes too long it is ended together with the processes it started."""
    environment = {**os.environ, **OFFLINE, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:
        try:
            printed, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, printed
    return printed


def answers(folder: Path) -> dict[int, str]:
    (file,) = folder.glob("*/*_samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


# -- registration ---------------------------------------------------------------------------------------------------


def test_models_are_registered_without_loading_torch() -> None:
    from lmms_eval.models import get_model, get_model_manifest

    assert get_model_manifest("sparsemm_llava_next").simple_class_path is None
    assert get_model("sparsemm_qwen2_vl").is_simple is False
    code = "import sys, sparsemm_lmms_eval.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_settings_are_checked_before_weights_are_read(checkpoints: Path) -> None:
    from lmms_eval.models import get_model

    build = get_model("sparsemm_qwen2_vl")
    here = str(checkpoints / "qwen2-vl")
    with pytest.raises(ConfigError, match="nonsense"):
        build(here, method="fullkv", nonsense=1)
    with pytest.raises(ConfigError, match="budget=2"):
        build(here, method="snapkv", budget=2)
    with pytest.raises(ConfigError, match="batch_size='many'"):
        build(here, method="fullkv", batch_size="many")
    with pytest.raises(ConfigError, match="decode_backend='fast'"):
        build(here, method="fullkv", decode_backend="fast")
    with pytest.raises(UnsupportedModelError, match="use model sparsemm"):
        build(str(checkpoints / "llava-mistral"), method="fullkv", device="cpu")


# -- grids ----------------------------------------------------------------------------------------------------------


def test_methods_that_keep_every_row_run_once_a_task(checkpoints: Path) -> None:
    cells = grid.main_grid(shared(checkpoints), short_tasks=True)
    assert len(cells) == 8 * (3 + 5 * 6)
    docvqa = [cell.label for cell in cells if cell.task == "docvqa_val"]
    assert docvqa[:3] == ["fullkv", "mask-m0.1", "mask_random-m0.1"]
    budgets = {cell.settings["budget"] for cell in cells if cell.task == "gqa" and cell.settings["budget"]}
    assert budgets == {48, 64, 96, 128, 256, 512}


def test_ablations_are_settings(checkpoints: Path) -> None:
    ratios = grid.ratio_grid(shared(checkpoints))
    assert [cell.settings["ratio"] for cell in ratios] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0]
    assert {(cell.task, cell.settings["budget"]) for cell in ratios} == {("ocrbench", 256)}
    parts = [cell.settings for cell in grid.parts_grid(shared(checkpoints), budgets=[48])]
    assert [(each["window_size"], each["ratio"]) for each in parts] == [(48, 0.0), (4, 1.0), (4, 0.1)]


def test_rounding_is_the_papers_unless_the_model_is_a_miniature(checkpoints: Path, monkeypatch: Any) -> None:
    cell = shared(checkpoints, rounding=None).cell("gqa", "snapkv", 64)
    assert (cell.settings["rounding"], cell.settings["window_size"]) == ("paper", 4)
    monkeypatch.setattr(grid, "is_miniature", lambda model: True)
    cell = shared(checkpoints, rounding=None, limit=None).cell("gqa", "snapkv", 64)
    assert (cell.settings["rounding"], cell.limit) == ("exact", 200)


def test_offline_tasks_are_refused_for_a_model_of_larger_pages(checkpoints: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(grid, "defaults_of", lambda model: WIDE)
    with pytest.raises(ConfigError, match="pages of 224 pixels.*use `sparsemm evaluate`"):
        shared(checkpoints).cell("sparsemm_read", "snapkv", 64)
    assert shared(checkpoints).cell("gqa", "snapkv", 64).task == "gqa"


def test_methods_without_a_release_take_exact_rounding_and_a_calibration(checkpoints: Path, tmp_path: Path) -> None:
    assert shared(checkpoints, rounding=None).cell("gqa", "vl_cache", 64).settings["rounding"] == "exact"
    with pytest.raises(ConfigError, match="'vl_cache' is none of them"):
        shared(checkpoints, rounding="paper").cell("gqa", "vl_cache", 64)
    plain = HeadScores.load(checkpoints / "scores.json")
    shape = tuple(plain.values.shape)
    curves = Curves([4], torch.ones(shape), torch.ones(*shape, 1), retrieval=torch.ones(shape))
    HeadScores(plain.values, curves=curves, **plain.provenance).save(tmp_path / "calibration.json")
    given = shared(checkpoints, rounding=None, head_scores=tmp_path / "calibration.json")
    for method in ("rate_distortion", "head_kv", "sparsemm"):
        assert given.cell("gqa", method, 64).settings["head_scores"] == str(tmp_path / "calibration.json")


def test_a_folder_is_one_cells(checkpoints: Path, tmp_path: Path) -> None:
    base = shared(checkpoints).cell("gqa", "sparsemm", 64)
    others = [
        shared(checkpoints, **change).cell("gqa", "sparsemm", 64)
        for change in (
            {"ratio": 0.5},
            {"rounding": "paper"},
            {"limit": 6},
            {"seed": 1},
            {"loading": {"dtype": "float16"}},
        )
    ]
    folders = {cell.folder(tmp_path) for cell in (base, *others)}
    assert len(folders) == 6
    same = shared(checkpoints, loading={"batch_size": 8}).cell("gqa", "sparsemm", 64)
    assert same.folder(tmp_path) == base.folder(tmp_path)
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    assert shared(copy).cell("gqa", "sparsemm", 64).folder(tmp_path) == base.folder(tmp_path)
    weights = copy / "qwen2-vl" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert shared(copy).cell("gqa", "sparsemm", 64).folder(tmp_path) != base.folder(tmp_path)


# -- running --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[grid.Cell]]:
    """The field task with three methods, one process, batches of 4."""
    output = tmp_path_factory.mktemp("finished")
    cells = grid.main_grid(shared(checkpoints), ["fullkv", "sparsemm", "mask"], [8], ["sparsemm_field"])
    assert runner.run_cells(cells, output, report=lambda line: None) == []
    return output, cells


def test_samples_and_results_carry_settings_and_figures(finished: tuple[Path, list[grid.Cell]]) -> None:
    output, cells = finished
    folder = cells[-1].folder(output)
    (file,) = folder.glob("*/*_samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 5
    for sample in samples:
        (counts,) = sample["token_counts"]
        assert counts["config"] == cells[-1].settings
        assert (counts["nominal_budget"], counts["effective_budget"]) == (8, 8.0)
        assert 0 < counts["cache_bytes"] < counts["full_cache_bytes"]
        assert counts["ms_per_token"] > 0 and counts["output_tokens"] == 48
        assert {"anls", "accuracy", "exact_match"} <= sample.keys()
    (results,) = folder.glob("*/*_results.json")
    summary = json.loads(results.read_text())["sparsemm"]["summary"]
    mean = sum(sample["token_counts"][0]["cache_bytes"] for sample in samples) / 5
    assert summary["cache_bytes"] == pytest.approx(mean)
    assert (summary["effective_budget"], summary["documents"]) == (8.0, 5)
    assert summary["scores"]["accuracy"] == [sample["accuracy"] for sample in samples]
    assert summary["metrics"]["accuracy"] == pytest.approx(sum(summary["scores"]["accuracy"]) / 5)
    prompts = [sample["token_counts"][0]["input_tokens"] for sample in samples]
    assert summary["cache_share"] == pytest.approx(sum((8 + 48) / (tokens + 48) for tokens in prompts) / 5)
    assert summary["ms_per_token"]["count"] == 5
    full = json.loads((cells[0].folder(output) / "cell.json").read_text())["summary"]
    assert full["cache_share"] == 1.0 and "100.0 % of full" in runner.describe(full)


def test_tokens_are_counted_up_to_the_one_that_ends_an_answer() -> None:
    from sparsemm_lmms_eval.answers import count_tokens

    tokens = torch.tensor([[5, 2, 2, 7], [5, 6, 7, 8], [9, 1, 2, 1]])
    assert count_tokens(tokens, []) == [4, 4, 4]
    assert count_tokens(tokens, 2) == [2, 4, 3]
    assert count_tokens(tokens, [2, 9]) == [2, 4, 1]


def test_only_means_of_what_the_samples_hold_are_scores_of_documents() -> None:
    figures = dict.fromkeys(("input_tokens", "output_tokens", "effective_budget", "cache_bytes", "full_cache_bytes"), 1)
    counts = {**figures, "cache_share": 1.0, "ms_per_token": None, "nominal_budget": None}
    samples = [{"token_counts": [counts], "a": a, "b": 1.0, "c": {"answer": "x"}} for a in (0.0, 1.0)]
    summary = runner.summarise({"a,none": 0.5, "b,none": 700, "c,none": 0.1, "a_stderr,none": "N/A"}, samples)
    assert summary["metrics"] == {"a": 0.5, "b": 700, "c": 0.1} and summary["scores"] == {"a": [0.0, 1.0]}


def test_answers_equal_those_of_transformers_alone(finished: tuple[Path, list[grid.Cell]], checkpoints: Path) -> None:
    from sparsemm_lmms_eval.pages import page

    output, cells = finished
    found = answers(cells[0].folder(output))
    for index in range(5):
        own = page("field", index)
        assert found[index] == reference_answer("qwen2-vl", own.image, own.prompt, 48)


def test_finished_cells_are_skipped(finished: tuple[Path, list[grid.Cell]], monkeypatch: Any) -> None:
    output, cells = finished
    monkeypatch.setattr(runner, "run_cell", lambda *given: pytest.fail("a finished cell ran again"))
    lines: list[str] = []
    assert runner.run_cells(cells, output, report=lines.append) == []
    assert lines == ["3 cells, 3 of them finished before"]


def test_batches_of_one_answer_alike(finished: tuple[Path, list[grid.Cell]], checkpoints: Path, tmp_path: Path) -> None:
    output, cells = finished
    alone = [dataclasses.replace(cell, loading={**QUIET, "batch_size": 1}) for cell in cells]
    assert runner.run_cells(alone, tmp_path, report=lambda line: None) == []
    for cell in cells:
        assert answers(cell.folder(tmp_path)) == answers(cell.folder(output))


def test_a_failed_cell_is_seen_and_resumes(
    finished: tuple[Path, list[grid.Cell]], checkpoints: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from sparsemm_lmms_eval.model import SparseMMModel

    output, cells = finished
    answered: list[int] = []
    original = SparseMMModel._answer

    def interrupted(self: Any, batch: list[Any], *given: Any) -> list[dict[str, Any]]:
        if self.compression.method == "fullkv" and answered:
            raise RuntimeError("power cut")
        answered.extend(question.document for question in batch)
        return original(self, batch, *given)

    monkeypatch.setattr(SparseMMModel, "_answer", interrupted)
    failed = runner.run_cells(cells[:2], tmp_path, report=lambda line: None)
    assert failed == [cells[0]]
    assert "power cut" in json.loads((cells[0].folder(tmp_path) / "failed.json").read_text())["error"]
    assert {m.method: m.error for m in read_measurements([tmp_path])} == {
        "fullkv": "RuntimeError: power cut",
        "mask": None,
    }

    answered.clear()
    monkeypatch.setattr(
        SparseMMModel, "_answer", lambda *a: (answered.extend(question.document for question in a[1]), original(*a))[1]
    )
    assert runner.run_cells(cells[:2], tmp_path, report=lambda line: None) == []
    assert answered == [4]  # the first batch of four was answered before
    assert answers(cells[0].folder(tmp_path)) == answers(cells[0].folder(output))
    assert not (cells[0].folder(tmp_path) / "failed.json").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tasks=sparsemm_read,ocrbnch", "task 'ocrbnch' is not one of .* did you mean .*ocrbench"),
        ("--tasks=,", "--tasks is empty"),
        ("--methods=,", "--methods is empty"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said_before_its_first_cell(
    option: str, message: str, checkpoints: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """By the program of the plug-in, which the scripts call; nothing is loaded, nothing written."""
    common = [f"--model={checkpoints / 'qwen2-vl'}", f"--head-scores={checkpoints / 'scores.json'}"]
    common += [f"--output={tmp_path / 'out'}", "--methods=fullkv", "--tasks=sparsemm_read"]
    monkeypatch.setattr(sys, "argv", ["sparsemm_lmms_eval", "run", *common, option])
    monkeypatch.setattr(runner, "load", lambda cell: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ending:
        run_program_of(app, "sparsemm_lmms_eval")
    said = capsys.readouterr().err
    assert ending.value.code == 2 and re.search(f"^error: {message}", said, re.MULTILINE), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


# -- the benchmarks -------------------------------------------------------------------------------------------------


def reference_answer(family: str, image: Any, prompt: str, limit: int) -> str:
    """What the stock model says to the stock template: nothing of this package but the processor class."""
    processor = toy_processor(family)
    model = toy_model(family)
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    if family == "qwen2-vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).long()
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def needs(task: str) -> None:
    if task == "textcaps_val":
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed, which TextCaps needs")
        if shutil.which("java") is None:
            pytest.skip("there is no Java runtime, which TextCaps needs")


@pytest.mark.parametrize("task", COPIES)
def test_a_benchmark_from_document_to_score(
    task: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(task)
    monkeypatch.chdir(tmp_path)
    _, _, _, prompt, limit, metric, expected = COPIES[task]
    family = "llava-mistral"
    right = reference_answer(family, picture(0), prompt, limit)
    monkeypatch.setattr("datasets.load_dataset", load_dataset(right))
    cell = shared(checkpoints, family, limit=None).cell(task, "fullkv", None)
    assert runner.run_cells([cell], tmp_path / "out", report=print) == []
    given = answers(cell.folder(tmp_path / "out"))
    assert given[0] == right and given[1] != right
    (found,) = read_measurements([tmp_path / "out"])
    if metric == "textcaps_CIDEr":
        assert found.metrics[metric] > 1  # a caption equal to all references, out of two
    else:
        assert found.metrics[metric] == pytest.approx(expected)
    assert found.documents == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # submission files lie with the cell


def test_a_second_cell_of_ocrbench_starts_from_zero(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OCRBench adds its scores up in a global of its module."""
    monkeypatch.setattr("datasets.load_dataset", load_dataset("e"))
    cells = grid.main_grid(shared(checkpoints, limit=None), ["fullkv", "snapkv"], [16], ["ocrbench"])
    assert runner.run_cells(cells, tmp_path, report=print) == []
    values = [m.metrics["ocrbench_accuracy"] for m in read_measurements([tmp_path])]
    assert len(values) == 2 and all(value <= 0.002 for value in values) and max(values) == 0.001


# -- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sharing", [["NUM_PROCESSES"], ["NUM_PROCESSES", "TENSOR_PARALLEL"]], ids=["default", "divided"]
)
def test_processes_answer_like_one(
    sharing: list[str], finished: tuple[Path, list[grid.Cell]], checkpoints: Path, tmp_path: Path
) -> None:
    """Through the script; five documents, so that one process is padded with a document of its own. Two processes, or
    two models on two each; on a device that is named only where there are GPUs, and not one for each."""
    device = "cpu" if 0 < torch.cuda.device_count() < 2 ** len(sharing) else ""
    output, cells = finished
    settings = {
        "MODEL": str(checkpoints / "qwen2-vl"),
        "HEAD_SCORES": str(checkpoints / "scores.json"),
        "METHODS": "sparsemm",
        "BUDGETS": "8",
        "TASKS": "sparsemm_field",
        "WINDOW_SIZE": "4",
        "ROUNDING": "exact",
        "LIMIT": "5",
        "BATCH_SIZE": "4",
        **dict.fromkeys(sharing, "2"),
        "DEVICE": device,
        "OUTPUT": str(tmp_path / "out"),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "eval" / "qwen.sh")]
    assert "(exact rounding)" in run_program(command, tmp_path, **settings, PATH=path)
    (folder,) = (tmp_path / "out" / "qwen2-vl" / "sparsemm_field").iterdir()
    assert json.loads((folder / "cell.json").read_text())["processes"] == 2 ** len(sharing)
    assert answers(folder) == answers(cells[-1].folder(output))


def test_the_program_of_lmms_eval_runs_our_models_and_tasks(checkpoints: Path, tmp_path: Path) -> None:
    arguments = f"pretrained={checkpoints / 'llava-mistral'},method=snapkv,budget=8,window_size=4"
    command = [sys.executable, "-m", "lmms_eval", "--model", "sparsemm_llava_next", "--model_args", arguments]
    command += ["--include_path", str(TASKS_FOLDER), "--tasks", "sparsemm_read", "--limit", "3", "--device", "cpu"]
    command += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    run_program(command, tmp_path)
    (found,) = read_measurements([tmp_path / "out"])
    assert (found.model, found.method, found.budget, found.documents) == ("llava-mistral", "snapkv", 8, 3)
    assert found.effective_budget == 8.0 and 0 <= found.metrics["anls"] <= 1

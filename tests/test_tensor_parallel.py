"""Models divided among processes (gloo, on the CPU) do as whole ones do; their processes agree, and end together."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import parallel_runs
import pytest
from greedy_runs import TOLERANCE
from parallel_runs import BUDGET, FAMILIES, GROUPS, Models, in_processes
from typer.testing import CliRunner

import sparsemm
from sparsemm.cli import app, processes
from sparsemm.cli.processes import _report as report
from sparsemm.cli.processes import leave_message, run_together
from sparsemm.errors import ConfigError
from sparsemm.experiments.session import heldout_pages
from sparsemm.methods import METHODS
from sparsemm.models.parallel import join
from sparsemm.runs.processes import workers


def whole(folder: Path, runs) -> dict:
    models = Models(folder, divided=False)
    return {run.__name__: run(models) for run in runs}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and what this one finds."""
    folder = tmp_path_factory.mktemp("two")
    found = in_processes(2, folder, "two")
    return found, whole(folder, [run for run in GROUPS["two"] if run not in (parallel_runs.refusals,)])


def by_run(two, name):
    found, alone = two
    return [each[name] for each in found], alone.get(name)


def flat(values):
    return [value for each in values for value in flat(each)] if isinstance(values, list) else [values]


def assert_close(actual, expected):
    actual, expected = flat(actual), flat(expected)
    limit = TOLERANCE * max(1.0, *map(abs, expected))
    assert len(actual) == len(expected)
    assert max(abs(one - other) for one, other in zip(actual, expected, strict=True)) <= limit


def heads_together(ranks):
    """Positions by call, batch row and head, of the heads of all processes."""
    return [
        [[head for part in row for head in part] for row in zip(*call, strict=True)]
        for call in zip(*ranks, strict=True)
    ]


def test_full_budget_by_family(two):
    ranks, alone = by_run(two, "families")
    divided = set()
    for name in FAMILIES:
        if name in alone:
            assert "no tensor-parallel plan" in alone[name]
            continue
        if name in ranks[0]:
            assert name == "qwen3_vl_moe" and "mismatched" in ranks[0][name]  # transformers cannot load it so
            continue
        for rounding in ("exact", "paper"):
            *tokens, logits = alone[f"{name} {rounding}"]
            for rank in ranks:
                assert rank[f"{name} {rounding}"][:2] == tokens, name
                assert_close(rank[f"{name} {rounding}"][2], logits)
        divided.add(name)
    assert {"llava-vicuna", "llava-mistral", "qwen2-vl", "internvl", "glm4v", "phi3", "llava_onevision"} <= divided


@pytest.mark.parametrize("name", ["llava-vicuna", "qwen2-vl"])
def test_every_method_keeps_the_same(two, name):
    ranks, alone = by_run(two, "methods")
    assert {key.split()[1] for key in alone} == set(METHODS)
    for key, expected in alone.items():
        if key.startswith(name):
            keeps_the_same(key, [rank[key] for rank in ranks], expected)


def keeps_the_same(key, found, expected):
    assert heads_together([each["positions"] for each in found]) == expected["positions"], key
    for each in found:
        assert_close(each["logits"], expected["logits"])
        for what in ("tokens", "own loop", "kept", "full bytes", "masked"):
            assert each[what] == expected[what], (key, what)
    if METHODS[key.split()[1]].compresses and key.endswith("first"):
        layers = len(expected["kept"][0])
        heads = len(expected["kept"][0][0])
        assert all(sum(map(sum, row)) == BUDGET * layers * heads for row in found[0]["kept"]), key


def test_each_process_holds_its_part(two):
    ranks, alone = by_run(two, "methods")
    for key, expected in alone.items():
        holds_its_part(key, [rank[key] for rank in ranks], expected)


def holds_its_part(key, found, expected):
    assert sum(each["rows"] for each in found) == expected["rows"]
    assert all(each["bytes"] == found[0]["bytes"] for each in found), "statistics are the same in all"
    for each in found:
        # Every tensor that the cache reaches is counted: nothing of the prompt's full length stays.
        assert each["reachable"] <= each["held"] <= sum(expected["bytes"])
        if key.split()[1] in ("fullkv", "snapkv", "streaming_llm"):
            assert each["rows"] == expected["rows"] / len(found)


def test_bytes_sent_for_a_token(two):
    ranks, alone = by_run(two, "sending")
    for rank in ranks:
        for name, found in rank.items():
            sends_what_it_says(found, alone[name], hidden_size=64, own_logits=128 // 2)


def sends_what_it_says(found, alone, hidden_size, own_logits):
    """Of float32, in a step of two rows: two all-reduces a layer, one for an embedding divided by tokens, and a gather
    of the logits; where the layers are fused, DTensors have no part in them."""
    divided = found["on dtensors"] == ["aten::embedding"]
    assert divided or found["on dtensors"] == []
    sizes = [(name.removeprefix("gloo:"), math.prod(shape)) for name, shape in found["collectives"]]
    reduce, gather = ("all_reduce", 2 * hidden_size), ("all_gather", 2 * own_logits)
    assert found["fused"] == alone["fused"] == 2 and alone["counted"] == 0 and alone["collectives"] == []
    assert sizes in ([reduce] * 4, [reduce] * 5 + [gather], [reduce] * 4 + [gather])
    assert found["formula"] == found["counted"] == 4 * sum(size for _, size in sizes)
    assert found["weights"] < alone["weights"]  # the image encoder is whole in each


def test_benchmark_of_divided_weights(two):
    ranks, alone = by_run(two, "benchmark")
    for method, whole_figures in alone.items():
        for figures in (rank[method] for rank in ranks):
            assert figures["status"] == whole_figures["status"] == "ok", method
            assert 0.45 * whole_figures["cache_bytes"] < figures["cache_bytes"] < 0.55 * whole_figures["cache_bytes"]
            if method != "hf":
                assert figures["cache_bytes_by_rank"] == [rank[method]["cache_bytes"] for rank in ranks]
                assert figures["sent_bytes"] == figures["sent_formula"] > 0


def test_three_processes(tmp_path):
    """Where heads divide by three, and tokens with them."""
    ranks = [each["three"] for each in in_processes(3, tmp_path, "three")]
    alone = whole(tmp_path, GROUPS["three"])["three"]
    for key, expected in alone.items():
        found = [rank[key] for rank in ranks]
        if key.endswith("sent"):
            for each in found:
                sends_what_it_says(each, expected, 96 if key.startswith("llava") else 192, own_logits=129 // 3)
        else:
            keeps_the_same(key, found, expected)
            holds_its_part(key, found, expected)


def test_chase_writes_the_same_bytes(two):
    ranks, alone = by_run(two, "reading")
    for rank in ranks:
        assert rank["file"] == alone["file"]
        assert rank["columns"] == alone["columns"]
        assert rank["left"] == []


def test_pictures_show_all_heads(two):
    ranks, alone = by_run(two, "pictures")
    for rank in ranks:
        assert rank["kept"] == alone["kept"]
        assert_close(rank["rows"], alone["rows"])


def test_evaluation_gives_the_same_answers(two):
    ranks, alone = by_run(two, "answers")
    for rank in ranks:
        assert rank == alone


def test_sampling_draws_the_same_in_all(two):
    ranks, alone = by_run(two, "sampling")
    assert ranks[0] == ranks[1] == alone and alone["run"] == alone["replayed"]


def test_processes_that_differ_are_noticed(two):
    ranks, _ = by_run(two, "refusals")
    assert ranks[0] == ranks[1] | {"one": ranks[0]["one"]}
    assert "seed is 0 / 1" in ranks[0]["seed"]
    for name in ("seed", "head_scores", "sparsemm"):
        assert (
            ranks[0][name].startswith("the 2 processes that hold the model do not agree")
            and f"{name} is " in ranks[0][name]
        )
    assert ranks[0]["one"].startswith("HeadScoreError") and "3 layers x 4" in ranks[0]["one"]
    assert ranks[1]["one"] == f"{ranks[0]['one']} (so says process 0 of the 2 that hold the model)"
    assert ranks[0]["calibrate"].startswith("ConfigError: a calibration")
    assert ranks[0]["fused"] == [False, True] and ranks[0]["same"] == ranks[0]["tokens"]


def test_four_processes_and_two_models_on_two_each(tmp_path):
    found = in_processes(4, tmp_path, "four")
    expected = whole(tmp_path, GROUPS["four"])["many"]
    groups = {"4": [[0, 1, 2, 3]], "2": [[0, 1], [2, 3]]}
    for size, ranks in groups.items():
        for group in ranks:
            runs = [found[rank]["many"][size] for rank in group]
            assert heads_together([run["positions"] for run in runs]) == expected[size]["positions"]
            for run in runs:
                assert run["tokens"] == expected[size]["tokens"]
                assert_close(run["logits"], expected[size]["logits"])
    for rank in range(4):
        many = found[rank]["many"]
        assert "the 2 heads of its k_proj do not divide among the 4 processes" in many["uneven"]
        assert "the 2 kv heads of the model do not divide" in many["plan"]
        assert "a multiple of 3 processes, and there is 4" in many["join"]
    assert not math.isnan(sum(flat(expected["4"]["logits"])))


PAGES = ["--documents", "4", "--tasks", "read", "--num-words", "1", "--max-new-tokens", "8", "--no-progress"]


def test_a_killed_process_ends_the_others(tmp_path):
    """`sparsemm evaluate` starts the processes; one is killed once a cell is finished, and the file goes on later."""
    command = [sys.executable, "-m", "sparsemm", "evaluate", "--model", "qwen2-vl", "--tensor-parallel", "2", *PAGES]
    command += ["--methods", "fullkv,snapkv,adakv,sparsemm", "--budgets", "8,16,32,64", "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        results = tmp_path / "results.json"
        until(results.is_file)
        workers = children(program.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        until(lambda: not any(map(runs, workers)), seconds=10)
        output, errors = program.communicate(timeout=60)
    assert program.returncode == 1 and output == ""
    lines = [line for line in errors.splitlines() if line.startswith("error")]
    assert lines == [
        "error: process 1 of those that hold the model was ended by SIGKILL; the others were stopped, and what was "
        "finished is kept"
    ]
    cells = json.loads(results.read_text())["cells"]
    assert cells and cells[0]["method"] == "fullkv" and cells[0]["documents"] == 4


def children(pid: int) -> list[int]:
    """Processes that `pid` started as Python of its own."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in found if b"evaluate" in Path(f"/proc/{child}/cmdline").read_bytes())


def runs(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def failure(rank: int, code: int, when: int, message: str | None = None):
    data = {} if message is None else {"message": {"message": message}}
    return SimpleNamespace(local_rank=rank, exitcode=code, timestamp=when, error_file_data=data)


@pytest.mark.parametrize(
    ("failures", "status", "line"),
    [
        ([failure(0, 1, 8, "error: lost"), failure(1, 2, 7, "error: --budget 3")], 2, "error: --budget 3"),
        ([failure(0, 2, 7, "error: both"), failure(1, 2, 7, "error: both")], 2, "error: both"),
        ([failure(0, 1, 5, "error: lost"), failure(1, -9, 6)], 1, "error: process 1 of those that hold"),
        ([failure(0, -15, 5), failure(1, 2, 6, "error: said")], 2, "error: said"),
        ([failure(0, 1, 5), failure(1, 1, 5)], 1, ""),  # a command that ended so by itself
    ],
)
def test_one_message_whichever_process_fails(failures, status, line, capsys):
    assert report(dict(enumerate(failures))) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == (1 if line else 0)


def test_what_ends_a_process_is_left_to_the_launcher(tmp_path, monkeypatch):
    error = RuntimeError("[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    assert not leave_message(error, str(error))  # alone, it is printed
    monkeypatch.setattr(processes, "_together", True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert leave_message(error, str(error))
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    assert left["message"].startswith("error: another process that holds the model has gone")
    assert int(left["extraInfo"]["timestamp"]) > 0


def test_output_comes_once(tmp_path):
    """One answer from two processes, that of one; and a command that is not offered so says why."""
    picture = tmp_path / "page.png"
    heldout_pages(1, tasks=("read",), num_words=(2,))[0].image.save(picture)
    command = [sys.executable, "-m", "sparsemm", "generate", "--model", "qwen2-vl", "--image", str(picture)]
    command += ["--method", "snapkv", "--budget", "32", "--max-new-tokens", "8", "--json"]
    alone, two = (
        json.loads(subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout)
        for more in ([], ["--tensor-parallel", "2"])
    )
    measured = ("cache_bytes", "prefill_ms", "ms_per_token")
    assert {key: value for key, value in two.items() if key not in measured} == {
        key: value for key, value in alone.items() if key not in measured
    }


def test_a_calibration_is_refused_at_once():
    result = CliRunner().invoke(app, ["calibrate", "--tensor-parallel", "2", "--model", "qwen2-vl"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--tensor-parallel 2: a calibration runs in one process; --device auto")


def test_a_model_alone_is_not_divided(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="needs two processes or more, and there is 1; start them with torchrun"):
        sparsemm.load_model("assets/miniatures/qwen2-vl", tensor_parallel=True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="needs a multiple of 2 processes, and there is 3; start them with torchrun"):
        join(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 .* LOCAL_RANK, MASTER_ADDR, MASTER_PORT not: start"):
        join(2)
    for said in ("", "many", "-2"):
        monkeypatch.setenv("WORLD_SIZE", said)
        for asks in (join, workers, lambda: run_together(2)):
            with pytest.raises(ConfigError, match=f"WORLD_SIZE='{said}' of the environment is no number of processes"):
                asks()
    with pytest.raises(ConfigError, match="device='cpu': under tensor parallelism"):
        sparsemm.load_model("assets/miniatures/qwen2-vl", tensor_parallel=True, device="cpu")

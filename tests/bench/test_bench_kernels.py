"""The kernel benchmark: its score table, row counts and grid, and a run on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemm.bench import kernels
from sparsemm.bench.cells import BenchResults
from sparsemm.bench.kernel_calls import row_counts
from sparsemm.bench.shapes import attention_shape, shape_config, skewed_head_scores
from sparsemm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_skewed_and_uniform_rows_are_equally_many():
    shape = attention_shape(shape_config("vicuna-7b"))
    scores = skewed_head_scores(shape.layers, shape.query_heads)
    skewed, uniform = (row_counts(shape, 256, 4096, kind, scores) for kind in ("skewed", "uniform"))
    assert sum(skewed) == sum(uniform) and max(uniform) - min(uniform) <= 1
    assert max(skewed) > 3 * min(skewed)
    assert sum(skewed) == pytest.approx(256 * shape.kv_heads, rel=0.2)
    assert row_counts(shape, None, 4096, "skewed", scores) == [4096] * 32


def test_the_grid_repeats_nothing():
    cells = kernels.grid(("tiny",), (512,), (32, 64, None), (1,))
    assert len(cells) == len({tuple(cell.items()) for cell in cells})
    assert sum(cell["operation"] == "window_scores" for cell in cells) == 1
    assert not any(cell["budget"] is None and cell["operation"] in {"select", "compact"} for cell in cells)
    with pytest.raises(ConfigError, match="shape 'huge' is unknown"):
        kernels.grid(("huge",), (512,), (32,), (1,))
    with pytest.raises(ConfigError, match="operation 'sort' is unknown"):
        kernels.grid(("tiny",), (512,), (32,), (1,), ("sort",))


def test_a_run_counts_bytes_and_is_taken_up_again(tmp_path, monkeypatch):
    options = dict(
        shapes=("tiny",), prompts=(256,), budgets=(64,), batches=(2,), device="cpu", repeats=1, progress=False
    )
    output = tmp_path / "kernels.json"
    results = kernels.run(**options, output=output)
    assert results == BenchResults.load(output)
    assert len(results.runs) == 12 and all(" us, " in kernels.format_cell(cell) for cell in results.runs)
    by_operation = {cell.place["operation"]: cell for cell in results.runs}
    append, decode = by_operation["append"], by_operation["decode"]
    assert append.figures["bytes"] == 2 * 2 * 2 * 8 * 32 * 4  # read and write, key and value, batch 2, 8 heads, floats
    assert decode.figures["bytes"] == 2 * decode.figures["rows"] * 32 * 4 + 2 * (2 * 8 * 32 * 4)
    assert by_operation["silu_mul"].figures["bytes"] == 3 * 2 * 256 * 4  # batch 2, an MLP of 256, floats
    assert by_operation["rope_append"].figures["bytes"] == 2 * 4 * 32 * (2 * 8 + 4 * 8 + 2)
    assert "reference" in decode.times and all(each["median"] > 0 for each in decode.times.values())
    assert {"sparsemm", "original"} <= set(append.times) and not append.figures["failed"]

    def never(*arguments):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(kernels, "time_calls", never)
    assert kernels.run(**options, output=output).runs == results.runs


def test_a_time_limit_leaves_cells_for_the_next_run(tmp_path):
    options = dict(
        shapes=("tiny",), prompts=(256,), budgets=(64,), batches=(1,), device="cpu", repeats=1, progress=False
    )
    output = tmp_path / "kernels.json"
    assert kernels.run(**options, output=output, time_limit=-1).runs == []
    assert len(kernels.run(**options, output=output).runs) == 12


def test_the_check_of_a_gpu_can_be_walked_through_without_one(tmp_path):
    """Every step with tiny shapes."""
    command = [shutil.which("bash"), str(ROOT / "scripts" / "others" / "gpu_check.sh")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DRY": "1", "OUTPUT": str(tmp_path), "PATH": path}
    if shutil.which("sparsemm", path=path) is None:
        pytest.skip("the program is not installed")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert list(tmp_path.glob("tests.*.passed"))
    for name in kernels.CALLS:
        assert f" {name}: " in ran.stdout
    table = (tmp_path / "e2e" / "table.md").read_text()
    assert all(f"| {method} " in table for method in ("hf", "fullkv", "sparsemm")) and "kernels/step" in table
    assert len(BenchResults.load(tmp_path / "kernels.json").runs) == 12

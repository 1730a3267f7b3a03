"""The kernel benchmark: its score table, row counts and grid, and a run on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from sparsemm.bench import kernels
from sparsemm.bench.kernel_cases import SHAPES, row_counts, synthetic_head_scores
from sparsemm.errors import ConfigError


@pytest.mark.parametrize("name", ["vicuna-7b", "qwen2-vl-7b"])
def test_synthetic_scores_are_as_concentrated_as_the_release(name):
    shape = SHAPES[name]
    values = synthetic_head_scores(shape.layers, shape.query_heads).values.flatten().double()
    count = values.numel()
    ranked = values.sort(descending=True).values / values.sum()
    assert float(ranked[: round(0.05 * count)].sum()) == pytest.approx(0.55, abs=0.005)
    assert float(ranked[0] * count) == pytest.approx(26, abs=0.1)
    assert int((values == 0).sum()) == round(0.01 * count)
    assert torch.equal(values, synthetic_head_scores(shape.layers, shape.query_heads).values.flatten().double())


def test_skewed_and_uniform_rows_are_equally_many():
    shape = SHAPES["vicuna-7b"]
    scores = synthetic_head_scores(shape.layers, shape.query_heads)
    skewed, uniform = (row_counts(shape, 256, 4096, kind, scores) for kind in ("skewed", "uniform"))
    assert sum(skewed) == sum(uniform) and max(uniform) - min(uniform) <= 1
    assert max(skewed) > 3 * min(skewed)
    assert sum(skewed) == pytest.approx(256 * shape.kv_heads, rel=0.2)
    assert row_counts(shape, None, 4096, "skewed", scores) == [4096] * 32


def test_the_grid_repeats_nothing():
    cells = kernels.grid(("tiny",), (512,), (32, 64, None), (1,))
    assert len(cells) == len(set(cells))
    assert sum(cell.operation == "window_scores" for cell in cells) == 1
    assert not any(cell.budget is None and cell.operation in {"select", "compact"} for cell in cells)
    with pytest.raises(ConfigError, match="shape 'huge' is unknown"):
        kernels.grid(("huge",), (512,), (32,), (1,))
    with pytest.raises(ConfigError, match="operation 'sort' is unknown"):
        kernels.grid(("tiny",), (512,), (32,), (1,), ("sort",))


def test_a_run_counts_bytes_and_is_taken_up_again(tmp_path, monkeypatch):
    options = dict(
        shapes=("tiny",), prompts=(256,), budgets=(64,), batches=(2,), device="cpu", repeats=1, progress=False
    )
    output = tmp_path / "kernels.json"
    lines: list[str] = []
    results = kernels.run(**options, output=output, report=lines.append)
    assert results == json.loads(output.read_text()) and results["complete"]
    assert len(lines) == len(results["cells"]) == 9
    append = next(cell for cell in results["cells"] if cell["operation"] == "append")
    assert append["bytes"] == 2 * 2 * 2 * 2 * 32 * 4  # read and write, key and value, batch 2, 2 heads, 32 floats
    decode = next(cell for cell in results["cells"] if cell["operation"] == "decode")
    assert decode["bytes"] == 2 * decode["rows"] * 32 * 4 + 2 * (2 * 4 * 32 * 4)
    assert {"reference"} <= set(decode["times"]) and all(t["seconds"] > 0 for t in decode["times"].values())

    def never(*arguments):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(kernels, "measure_cell", never)
    again = kernels.run(**options, output=output)
    assert [cell["times"].keys() for cell in again["cells"]] == [cell["times"].keys() for cell in results["cells"]]


def test_a_time_limit_leaves_cells_for_the_next_run(tmp_path):
    options = dict(
        shapes=("tiny",), prompts=(256,), budgets=(64,), batches=(1,), device="cpu", repeats=1, progress=False
    )
    output = tmp_path / "kernels.json"
    first = kernels.run(**options, output=output, time_limit=0)
    assert not first["complete"] and first["cells"] == []
    assert kernels.run(**options, output=output)["complete"]

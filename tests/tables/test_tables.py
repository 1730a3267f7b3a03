"""The paper's figures, the reading of results, and the tables and figure made from both."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsemm.cli import app
from sparsemm.errors import ConfigError, DataError
from sparsemm.tables import Measurement, build_tables, plot_budgets, read_measurements, render_tables
from sparsemm.tables.measurements import parse_arguments, write_measurements
from sparsemm.tables.paper import benchmarks, paper, paper_model, printed

VICUNA, QWEN = "llava-v1.6-vicuna-7b-hf", "Qwen2-VL-7B-Instruct"


def leaves(value: Any) -> list[float]:
    return [each for part in value.values() for each in leaves(part)] if isinstance(value, dict) else [value]


# -- the paper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "part", "count", "total"),
    [
        ("table_1", "by_ratio", 24, 14.169),
        ("table_2", "by_parts", 18, 1402.7),
        # 450 cells less the 56 of DocVQA that are missing in the source; the sums were taken from its plain text.
        ("table_3", "by_benchmark", 394, 263.9445),
        ("table_4", "by_benchmark", 90, 6451.2),
    ],
)
def test_figures_of_the_paper_are_complete(table: str, part: str, count: int, total: float) -> None:
    values = leaves(paper()[table][part])
    assert len(values) == count
    assert sum(values) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(
    ("benchmark", "model", "method", "budget", "expected"),
    [
        ("DocVQA", "LLaVA-NeXT-Vicuna-7B", "sparsemm", 64, 0.6377),
        ("DocVQA", "LLaVA-NeXT-Vicuna-7B", "sparsemm", 256, None),
        ("DocVQA", "LLaVA-NeXT-Mistral-7B", "snapkv", 64, 0.4726),
        ("DocVQA", "Qwen2-VL-7B-Instruct", "pyramidkv", 128, 0.7394),
        ("OCRBench", "LLaVA-NeXT-Vicuna-7B", "pyramidkv", 512, 0.502),
        ("TextCaps", "Qwen2-VL-7B-Instruct", "adakv", 64, 0.8133),
        ("ChartQA", "LLaVA-NeXT-Mistral-7B", "random", 2048, 0.5272),
        ("MMBench", "Qwen2-VL-7B-Instruct", "sparsemm", 48, 77.92),
        ("VQAv2", "Qwen2-VL-7B-Instruct", "snapkv", 96, 74.32),
        ("GQA", "LLaVA-NeXT-Vicuna-7B", "snapkv", 96, None),
        ("OCRBench", "LLaVA-NeXT-Vicuna-7B", "fullkv", 64, None),
    ],
)
def test_spot_values(benchmark: str, model: str, method: str, budget: int, expected: float | None) -> None:
    tables = [printed(number, benchmark, model) for number in ("3", "4")]
    assert [t[method][str(budget)] for t in tables if str(budget) in t.get(method, {})] == (
        [] if expected is None else [expected]
    )


def test_models_are_recognised_by_their_checkpoint_not_by_a_likeness() -> None:
    assert paper_model("llava-hf/llava-v1.6-mistral-7b-hf") == "LLaVA-NeXT-Mistral-7B"
    assert paper_model("/data/Qwen2-VL-7B-Instruct") == "Qwen2-VL-7B-Instruct"
    assert paper_model("assets/miniatures/qwen2-vl") is None and paper_model("llava-vicuna") is None


def test_every_benchmark_names_its_metric_and_unit() -> None:
    metrics = {each.name: (each.metric, each.unit) for each in benchmarks().values()}
    assert metrics["TextCaps"] == ("textcaps_CIDEr", "CIDEr")
    assert metrics["OCRBench"] == ("ocrbench_accuracy", "share of 1000")
    assert metrics["ChartQA"] == ("relaxed_overall", "relaxed accuracy")
    assert all(unit for _, unit in metrics.values())


# -- reading --------------------------------------------------------------------------------------------------------


def lmms_results(**changes: Any) -> dict[str, Any]:
    """The parts of a results file of lmms-eval 0.7.3 that are read."""
    arguments = "pretrained=/models/llava-v1.6-vicuna-7b-hf,method=snapkv,budget=256,rounding=paper,seed=0"
    return {
        "results": {
            "docvqa_val": {"alias": "docvqa_val", "anls,none": 0.64, "anls_stderr,none": 0.02, "x_stderr": "N/A"}
        },
        "config": {"model": "sparsemm_llava_next", "model_args": arguments},
        "n-samples": {"docvqa_val": {"original": 5349, "effective": 100}},
        "throughput": {"avg_effective_budget": 250.5, "avg_cache_share": 0.1},
        **changes,
    }


def test_reads_what_the_program_of_lmms_eval_writes(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "20260101_000000_results.json").write_text(json.dumps(lmms_results()))
    (found,) = read_measurements([tmp_path])
    assert (found.model, found.task, found.method, found.budget) == (VICUNA, "docvqa_val", "snapkv", 256)
    assert (found.metrics, found.standard_errors) == ({"anls": 0.64}, {"anls": 0.02})
    assert (found.rounding, found.effective_budget, found.documents, found.cache_share) == ("paper", 250.5, 100, 0.1)


def test_means_over_several_tasks_are_not_taken_for_one(tmp_path: Path) -> None:
    both = {"docvqa_val": {"anls,none": 0.5}, "chartqa": {"relaxed_overall,none": 0.25}}
    (tmp_path / "20260101_000000_results.json").write_text(json.dumps(lmms_results(results=both)))
    found = {each.task: each for each in read_measurements([tmp_path])}
    assert found["chartqa"].metrics == {"relaxed_overall": 0.25}
    assert found["chartqa"].effective_budget is None


def test_arguments_with_commas_inside() -> None:
    text = "pretrained=/a,b/c,method=sparsemm,budget=64,ratio=0.1,head_scores=x.json"
    expected = {"pretrained": "/a,b/c", "method": "sparsemm", "budget": 64, "ratio": 0.1, "head_scores": "x.json"}
    assert parse_arguments(text) == expected


def write_cell(
    folder: Path, metrics: dict[str, float] | None, age: int = 0, scores: Any = None, **settings: Any
) -> None:
    folder.mkdir(parents=True)
    settings = {"method": "snapkv", "budget": 64, "rounding": "paper", **settings}
    cell = {"model": f"llava-hf/{VICUNA}", "task": "ocrbench", "settings": settings}
    if metrics is None:
        path, content = folder / "failed.json", {"cell": cell, "error": "out of memory"}
    else:
        summary = {"metrics": metrics, "effective_budget": 63.5, "documents": 1000, "ms_per_token": 20.0}
        summary |= {"cache_bytes": 1.0, "full_cache_bytes": 4.0, "seconds": 9.0}
        summary |= {} if scores is None else {"scores": scores}
        path = folder / "20260101_000000_results.json"
        content = {"results": {}, "sparsemm": {"cell": cell, "summary": summary}}
    path.write_text(json.dumps(content))
    os.utime(path, (1000 - age, 1000 - age))


def test_the_last_run_counts_and_a_success_replaces_a_failure(tmp_path: Path, caplog: Any) -> None:
    write_cell(tmp_path / "old", {"ocrbench_accuracy": 0.1}, age=50)
    write_cell(tmp_path / "new", {"ocrbench_accuracy": 0.2})
    write_cell(tmp_path / "other", {"ocrbench_accuracy": 0.3}, budget=128, age=50)
    write_cell(tmp_path / "failed later", None, budget=128)
    write_cell(tmp_path / "failed", None, budget=256)
    found = {each.budget: each for each in read_measurements([tmp_path])}
    assert found[64].metrics == {"ocrbench_accuracy": 0.2} and "more than once" in caplog.text
    assert found[128].metrics == {"ocrbench_accuracy": 0.3}
    assert found[256].error == "out of memory"


def test_documents_scores_give_the_standard_error(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell", {"ocrbench_accuracy": 0.5}, scores={"ocrbench_accuracy": [0.0, 1.0, 0.5, 0.5]})
    (found,) = read_measurements([tmp_path])
    # Sample variance 1 / 6, of the mean of four 1 / 24.
    assert found.standard_errors == {"ocrbench_accuracy": pytest.approx(24**-0.5)}
    entry = build_tables([found])[0].entry("snapkv", "64")
    assert (entry.measured, entry.standard_error) == (0.5, pytest.approx(24**-0.5))
    write_measurements([found], tmp_path / "all.json")
    assert read_measurements([tmp_path / "all.json"]) == [found]


def test_windows_are_chosen(tmp_path: Path) -> None:
    cells = [cell("qwen2-vl", "sparsemm_read", "snapkv", 16, 0.1 * w, window_size=w) for w in (4, 8, 12)]
    cells += [
        cell("qwen2-vl", "sparsemm_read", "fullkv", None, 0.9),
        cell("qwen2-vl", "sparsemm_read", "sparsemm", 16, 0.2, window_size=16),  # nothing but the window
    ]
    write_measurements(cells, tmp_path / "all.json")
    found = read_measurements([tmp_path / "all.json"], windows=[8, 12])
    assert sorted((each.method, each.window_size) for each in found) == [
        ("fullkv", 32), ("snapkv", 8), ("snapkv", 12), ("sparsemm", 16),
    ]  # fmt: skip


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_measurements([tmp_path / "nothing"])
    with pytest.raises(DataError, match="no results"):
        read_measurements([tmp_path])
    (tmp_path / "20260101_000000_results.json").write_text('{"config": {}}')
    with pytest.raises(DataError, match="000_results.json is not a result file"):
        read_measurements([tmp_path])


def test_files_of_tasks_are_passed_over(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell", {"ocrbench_accuracy": 0.1})
    (tmp_path / "cell" / "mmbench_en_dev_static_results.json").write_text('{"overall_acc": 0.5}')
    assert len(read_measurements([tmp_path])) == 1


def test_a_collection_of_cells_reads_back(tmp_path: Path) -> None:
    cells = [
        Measurement("qwen2-vl", "sparsemm_read", "fullkv", None, metrics={"accuracy": 0.9}, effective_budget=211.0),
        Measurement("qwen2-vl", "sparsemm_read", "sparsemm", 8, ratio=0.5, window_size=4, metrics={"accuracy": 0.5}),
    ]
    write_measurements(cells, tmp_path / "all.json")
    assert read_measurements([tmp_path / "all.json"]) == cells


# -- tables ---------------------------------------------------------------------------------------------------------


def cell(model: str, task: str, method: str, budget: int | None, value: float, **more: Any) -> Measurement:
    metric = benchmarks()[task].metric
    return Measurement(
        model, task, method, budget, metrics={metric: value}, effective_budget=more.pop("eff", 60), **more
    )


MEASURED = [
    cell(VICUNA, "docvqa_val", "sparsemm", 64, 0.63, rounding="paper", documents=100),
    cell(VICUNA, "docvqa_val", "sparsemm", 256, 0.67, rounding="paper", documents=100),
    cell(VICUNA, "docvqa_val", "snapkv", 256, 0.65, rounding="paper", documents=100),
    cell(VICUNA, "docvqa_val", "fullkv", None, 0.68, eff=2890, documents=100),
    cell(QWEN, "gqa", "sparsemm", 48, 0.61),
    cell(QWEN, "ocrbench", "sparsemm", 256, 0.8, ratio=0.0),
    cell(QWEN, "ocrbench", "sparsemm", 256, 0.81, ratio=0.1),
    cell(QWEN, "mmbench_en_dev_static", "sparsemm", 48, 66.0, ratio=0.0, window_size=48),
    cell(QWEN, "mmbench_en_dev_static", "sparsemm", 48, 78.0),
    cell("qwen2-vl", "sparsemm_read", "snapkv", 8, 0.5, window_size=4, eff=8),
    cell("qwen2-vl", "sparsemm_read", "fullkv", None, 0.9, eff=211.0),
    Measurement(QWEN, "gqa", "snapkv", 48, error="out of memory"),
]


def part(number: str, name: str) -> Any:
    return next(t for t in build_tables(MEASURED) if t.number == number and t.benchmark.name == name)


def test_a_cell_stands_beside_the_papers_figure() -> None:
    entry = part("3", "DocVQA").entry("sparsemm", "64")
    assert (entry.measured, entry.paper, entry.effective_budget) == (0.63, 0.6377, 60)
    assert entry.difference == pytest.approx(-0.0077)


def test_what_was_not_measured_or_not_printed_stays_empty() -> None:
    table = part("3", "DocVQA")
    missing_here, missing_there = table.entry("pyramidkv", "1024"), table.entry("sparsemm", "256")
    assert missing_here.measured is None and missing_here.difference is None and missing_here.paper == 0.6812
    assert missing_there.paper is None and missing_there.difference is None and missing_there.measured == 0.67
    assert table.entry("sparsemm", "1024").is_empty
    assert table.entry("fullkv", "all rows").measured == 0.68


def test_shares_are_printed_as_the_paper_prints_them() -> None:
    assert part("4", "GQA").entry("sparsemm", "48").measured == pytest.approx(61.0)
    assert part("4", "MMBench").entry("sparsemm", "48").difference == pytest.approx(78.0 - 77.92)


def test_ablations_do_not_get_into_the_main_tables() -> None:
    ratios = part("1", "OCRBench")
    assert ratios.entry("sparsemm", "0").difference == pytest.approx(0.8 - 0.809)
    assert ratios.entry("sparsemm", "0.8").measured is None and ratios.entry("sparsemm", "0.8").paper == 0.789
    parts = part("2", "MMBench")
    assert parts.entry("window", "48").measured == 66.0
    assert parts.entry("window+uniform+score", "48").measured == 78.0
    assert part("3", "OCRBench").entry("sparsemm", "256").measured == 0.81


def test_windows_do_not_share_a_table() -> None:
    cells = [
        cell("qwen2-vl", "sparsemm_read", method, 16, 0.1 * window, window_size=window)
        for method in ("snapkv", "sparsemm")
        for window in (4, 8)
    ]
    cells.append(cell("qwen2-vl", "sparsemm_read", "fullkv", None, 0.9))
    narrow, wide = build_tables(cells, numbers=["3"])
    assert narrow.title.endswith("qwen2-vl, window 4") and wide.variant == "window 8"
    assert narrow.entry("snapkv", "16").measured == pytest.approx(0.4)
    assert wide.entry("sparsemm", "16").measured == pytest.approx(0.8)
    assert narrow.entry("fullkv", "all rows") == wide.entry("fullkv", "all rows")
    (alone,) = build_tables(cells[:1], numbers=["3"])
    assert alone.title.endswith("qwen2-vl") and "window 4" in alone.notes


def test_the_two_ratios_of_table_2_are_no_sweep() -> None:
    cells = [cell("qwen2-vl", "sparsemm_read", "sparsemm", 16, 0.5, ratio=ratio, window_size=4) for ratio in (0.1, 1.0)]
    assert not build_tables(cells, numbers=["1"])
    cells.append(cell("qwen2-vl", "sparsemm_read", "sparsemm", 16, 0.4, ratio=0.0, window_size=4))
    (sweep,) = build_tables(cells, numbers=["1"])
    assert sweep.columns == ("0", "0.1", "1")


def test_a_failed_cell_is_visible() -> None:
    table = part("4", "GQA")
    assert table.entry("snapkv", "48").failed
    text = render_tables([table])
    assert "failed / 59.19" in text and "out of memory" in text


def test_random_heads_are_shown_as_the_mean_over_their_seeds(tmp_path: Path) -> None:
    metric = benchmarks()["sparsemm_read"].metric
    drawn = [
        cell("qwen2-vl", "sparsemm_read", "random", 8, value, window_size=4, seed=seed, standard_errors={metric: 0.03})
        for seed, value in enumerate((0.40, 0.46, 0.43))
    ]
    plain = [cell("qwen2-vl", "sparsemm_read", "snapkv", 8, 0.5, window_size=4, seed=seed) for seed in (0, 1)]
    write_measurements([*drawn, *plain], tmp_path / "all.json")
    (table,) = build_tables(read_measurements([tmp_path / "all.json"]), numbers="3")
    entry = table.entry("random", "8")
    assert entry.measured == pytest.approx(0.43 * table.benchmark.scale)
    # The documents' part stays as it is; what the seeds differ by, .03 of one, is that of a mean of three.
    assert entry.standard_error == pytest.approx((0.03**2 + 0.03**2 / 3) ** 0.5 * table.benchmark.scale)
    assert "random heads: mean of seeds 0, 1, 2" in table.notes
    assert table.entry("snapkv", "8").standard_error is None  # two runs of one cell are no two seeds
    failed = Measurement("qwen2-vl", "sparsemm_read", "random", 8, window_size=4, seed=3, error="out of memory")
    (table,) = build_tables([*drawn, failed], numbers="3")
    assert not table.entry("random", "8").failed and "failed: random 8: out of memory" in table.notes


def test_other_models_get_tables_without_the_papers_columns() -> None:
    text = render_tables([part("3", "Document reading")])
    assert "As Table 3" in text and "0.500 [8]" in text and "0.900 [211]" in text and " / " not in text.split("\n\n")[1]


def test_all_parts_on_request_and_unknown_tables_refused() -> None:
    assert len(build_tables(MEASURED[:1])) == 1
    assert len(build_tables(MEASURED[:1], whole=True)) == 3 + 1 + 15 + 3
    with pytest.raises(ConfigError, match="'5'"):
        build_tables(MEASURED, numbers=["5"])


def test_another_metric_has_no_figure_of_the_paper() -> None:
    both = [Measurement(QWEN, "gqa", "sparsemm", 48, metrics={"exact_match": 0.6, "length": 3.0})]
    (table,) = build_tables(both, metric="length")
    assert (table.entry("sparsemm", "48").measured, table.entry("sparsemm", "48").paper) == (3.0, None)


def test_formats_agree() -> None:
    tables = build_tables(MEASURED)
    rows = list(csv.DictReader(io.StringIO(render_tables(tables, "csv"))))
    records = json.loads(render_tables(tables, "json"))
    assert len(rows) == len(records) == sum(not e.is_empty for t in tables for r in t.rows.values() for e in r.values())
    (row,) = [r for r in rows if (r["benchmark"], r["row"], r["budget"]) == ("DocVQA", "SparseMM", "64")]
    assert (float(row["measured"]), float(row["paper"]), row["unit"]) == (0.63, 0.6377, "ANLS")
    markdown, latex = render_tables(tables), render_tables(tables, "latex")
    assert "0.6300 [60] / 0.6377 / −0.0077" in markdown
    assert r"0.6300 [60] {\scriptsize(0.6377, $-$0.0077)}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(tables)
    with pytest.raises(ConfigError, match="'html'"):
        render_tables(tables, "html")


def test_figure(tmp_path: Path) -> None:
    tables = build_tables(MEASURED)
    plot_budgets(tables, tmp_path / "a.svg")
    drawing = (tmp_path / "a.svg").read_text()
    assert drawing.startswith("<?xml") and drawing.count('id="axes_') >= 5
    with pytest.raises(DataError, match="image format"):
        plot_budgets(tables, tmp_path / "a.txt")
    with pytest.raises(DataError, match="at a budget"):
        plot_budgets(build_tables([MEASURED[3]]), tmp_path / "b.svg")


def test_panels_come_in_order_with_one_range_a_task_and_error_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsemm.tables import figure

    cells = [
        cell(model, task, method, budget, 0.1 * position + 0.001 * budget, standard_errors={"accuracy": 0.05})
        for position, model in enumerate(("qwen2-vl", "llava-mistral", "another", "llava-vicuna"), start=1)
        for task in ("sparsemm_field", "sparsemm_read")
        for method in ("snapkv", "sparsemm")
        for budget in (16, 64)
    ]
    cells.append(cell("qwen2-vl", "sparsemm_read", "sparsemm", 12, 0.3))  # an ablation's: no other method has it
    cells.append(cell("qwen2-vl", "sparsemm_read", "mask", None, 0.2, standard_errors={"accuracy": 0.01}))
    drawn: list[Any] = []
    real = figure.draw_panels
    monkeypatch.setattr(figure, "draw_panels", lambda rows, *a, **k: (drawn.extend(rows), real(rows, *a, **k)))
    plot_budgets(build_tables(cells), tmp_path / "a.svg")
    titles = [[panel.title for panel in row] for row in drawn]
    names = ("llava-vicuna", "llava-mistral", "qwen2-vl", "another")
    assert titles == [[f"Document reading: {name}", f"Field question: {name}"] for name in names]
    panel = drawn[2][0]
    assert panel.lines["sparsemm"] == {16.0: (pytest.approx(0.116), 0.05), 64.0: (pytest.approx(0.164), 0.05)}
    assert panel.levels == {"mask": (0.2, 0.01)}
    assert (tmp_path / "a.svg").read_text().count("LineCollection") >= 16, "an error bar a line"


def test_command(tmp_path: Path) -> None:
    write_cell(tmp_path / "in" / "a", {"ocrbench_accuracy": 0.35})
    write_cell(tmp_path / "in" / "b", {"ocrbench_accuracy": 0.45}, rounding="exact")
    out = tmp_path / "out"
    arguments = ["tables", str(tmp_path / "in"), "--rounding", "paper", "--output", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--collect", str(tmp_path / "all.json")])
    assert result.exit_code == 0, result.output
    assert "0.350 [63.5] / 0.340 / +0.010" in result.output
    assert {path.name for path in out.iterdir()} == {f"tables.{e}" for e in ("md", "csv", "tex", "json")} | {
        "budgets.png"
    }
    assert [each.rounding for each in read_measurements([tmp_path / "all.json"])] == ["paper"]

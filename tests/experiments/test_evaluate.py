"""Evaluation on untrained miniatures: which cells are run, what they hold, resuming, and the table and plot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_models import TINY_MINIATURE

import sparsemm.experiments.evaluate as engine
from sparsemm.decoding.generation import generate_greedy, remember_image_features
from sparsemm.errors import ConfigError, DataError
from sparsemm.experiments.evaluate import Cell, Results
from sparsemm.experiments.paired import format_pairs, pair_with_best
from sparsemm.experiments.report import describe, format_by_budget, format_table, plot_accuracy
from sparsemm.experiments.session import PageReader, heldout_pages
from sparsemm.head_scores import HeadScores
from sparsemm.miniatures.architectures import build_model, build_processor
from sparsemm.models import family_of
from sparsemm.runs.metrics import mean_metrics
from sparsemm.runs.spread import spread_of

SCORES = HeadScores(torch.arange(1.0, 9.0).view(2, 4), source="test")
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    model = build_model("qwen2-vl", dims=TINY_MINIATURE).eval()
    model.generation_config.eos_token_id = None  # an untrained model may end at once, and there is nothing to time
    return model, build_processor("qwen2-vl", TINY_MINIATURE)


@pytest.fixture(scope="module")
def pages() -> list[Any]:
    return heldout_pages(5, num_words=(1, 3))


READING = ("output", "fresh", "model_name", "batch_size")


def run(reader: tuple[Any, Any], pages: list[Any], **settings: Any) -> list[Cell]:
    how = dict(batch_size=2) | {name: settings.pop(name) for name in READING if name in settings}
    defaults = dict(
        methods=["fullkv", "snapkv", "sparsemm", "mask"],
        budgets=[16, 1000],
        head_scores=SCORES,
        window_size=4,
        mask_ratio=0.25,
    )
    page_reader = PageReader(*reader, pages, max_new_tokens=NEW_TOKENS, progress=False, **how)
    return engine.evaluate(page_reader, **{**defaults, **settings})


def test_answers_have_room_for_what_the_pages_hold(reader: tuple[Any, Any], pages: list[Any]) -> None:
    long = heldout_pages(1, tasks=["read"], num_words=[20], size=384)
    assert PageReader(*reader, pages).max_new_tokens == 48
    assert PageReader(*reader, pages + long).max_new_tokens == len(long[0].answer) + 8 > 48
    assert PageReader(*reader, long, max_new_tokens=5).max_new_tokens == 5


def test_cells_hold_what_was_run(reader: tuple[Any, Any], pages: list[Any], tmp_path: Path) -> None:
    cells = run(reader, pages, output=tmp_path / "results.json", model_name="toy")
    wanted = [("fullkv", None), ("snapkv", 16), ("snapkv", 1000), ("sparsemm", 16), ("sparsemm", 1000), ("mask", None)]
    assert [cell.key for cell in cells] == wanted, "methods without a budget run once"
    for cell in cells:
        expected = min(cell.nominal_budget or 10**9, cell.prompt_tokens)
        assert cell.effective_budget == pytest.approx(expected, abs=1e-9)
        assert cell.documents == 5
        # Three batches of 2, 2 and 1 pages, decoded to their end.
        assert cell.tokens == 5 * NEW_TOKENS
        assert cell.ms_per_token["count"] == cell.prefill_ms["count"] == 3
        assert 0 < cell.ms_per_token["q25"] <= cell.ms_per_token["median"] <= cell.ms_per_token["q75"]
        assert cell.prefill_ms["median"] > 0
        assert cell.environment["torch"] == torch.__version__
        assert cell.config["window_size"] == 4
        assert {task: len(cell.documents_of("anls", task)) for task in cell.tasks} == {"read": 3, "field": 2}
    small, full = cells[1], cells[0]
    rows = small.effective_budget + NEW_TOKENS
    row_bytes = 2 * 32 * 4 * TINY_MINIATURE.num_layers * TINY_MINIATURE.num_kv_heads
    assert small.cache_bytes == pytest.approx(rows * row_bytes + small.slack_bytes) and small.slack_bytes >= 0
    assert small.cache_share == pytest.approx(rows / (small.prompt_tokens + NEW_TOKENS)) and full.cache_share == 1.0
    assert {cell.full_cache_bytes for cell in cells} == {(full.prompt_tokens + NEW_TOKENS) * row_bytes}
    stored = Results.load(tmp_path / "results.json")
    assert stored.cells == cells
    assert stored.settings["model"] == "toy" and stored.settings["options"]["mask_ratio"] == 0.25


def test_the_share_of_a_full_cache_does_not_depend_on_what_is_generated(
    reader: tuple[Any, Any], pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of one token and of four: same prompt, same room, same share; a full cache has all of it."""
    settings: dict[str, Any] = dict(methods=["fullkv", "snapkv"], budgets=[16])
    longer = run(reader, pages, **settings)
    monkeypatch.setattr(reader[0].generation_config, "eos_token_id", list(range(reader[0].lm_head.out_features)))
    shorter = run(reader, pages, **settings)
    assert [cell.tokens for cell in shorter] == [5, 5] and [cell.tokens for cell in longer] == [20, 20]
    assert [cell.cache_share for cell in shorter] == [cell.cache_share for cell in longer]
    assert longer[0].cache_share == 1.0


def test_every_cell_is_warmed_up(reader: tuple[Any, Any], pages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = generate_greedy
    monkeypatch.setattr(
        "sparsemm.experiments.session.generate_greedy",
        lambda model, inputs, tokens: (asked.append(tokens), real(model, inputs, tokens))[1],
    )
    run(reader, pages, methods=["fullkv", "snapkv"], budgets=[16])
    assert asked == 2 * [3, NEW_TOKENS, NEW_TOKENS, NEW_TOKENS]


def test_a_noisy_cell_is_measured_again(
    reader: tuple[Any, Any], pages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    before = run(reader, pages, output=path, methods=["fullkv", "snapkv"], budgets=[16])
    document = json.loads(path.read_text())
    document["cells"][0]["ms_per_token"] = {"median": 1.0, "q25": 0.9, "q75": 1.5, "count": 3}
    document["cells"][1]["ms_per_token"] = document["cells"][1]["prefill_ms"] = spread_of([1.0, 1.1])
    path.write_text(json.dumps(document))
    monkeypatch.setattr("sparsemm.runs.spread.NOISY", 0.5)
    assert "noisy" in format_table(Results.load(path).cells)
    after = run(reader, pages, output=path, methods=["fullkv", "snapkv"], budgets=[16])
    stored = Results.load(path).cells
    assert [cell.key for cell in stored] == [cell.key for cell in before], "in its place, once"
    assert stored[0].ms_per_token != {"median": 1.0, "q25": 0.9, "q75": 1.5, "count": 3} and stored == after
    assert stored[1].ms_per_token == spread_of([1.0, 1.1]), "the other is kept"


def test_scores_are_those_of_the_text_the_unpatched_model_gives(reader: tuple[Any, Any], pages: list[Any]) -> None:
    model, processor = reader
    (cell,) = run(reader, pages, methods=["fullkv"])
    texts = []
    for page in pages:
        inputs = family_of(model).build_inputs(processor, [page.image], [page.prompt])
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    whole = mean_metrics(texts, [page.answer for page in pages])
    assert {name: getattr(cell, name) for name in whole} == pytest.approx(whole)
    read = [index for index, page in enumerate(pages) if page.task == "read"]
    part = mean_metrics([texts[index] for index in read], [pages[index].answer for index in read])
    assert {name: cell.mean(name, "read") for name in part} == pytest.approx(part)


def test_a_perfect_reader_scores_one_on_every_page(
    reader: tuple[Any, Any], pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = reader
    answers = {page.image.tobytes(): page.answer for page in pages}
    real_batches = PageReader.batches.func

    def remember(reader: PageReader) -> Any:
        return [
            (chosen, {**inputs, "answers": [answers[page.image.tobytes()] for page in chosen]})
            for chosen, inputs in real_batches(reader)
        ]

    def generate(model: Any, inputs: Any, max_new_tokens: int) -> Any:
        texts = inputs["answers"]
        _, clock = generate_greedy(model, {k: v for k, v in inputs.items() if k != "answers"}, 2)
        return processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"], clock

    monkeypatch.setattr(PageReader, "batches", property(remember))
    monkeypatch.setattr("sparsemm.experiments.session.generate_greedy", generate)
    (cell,) = run(reader, pages, methods=["fullkv"])
    assert cell.accuracy == cell.exact_match == cell.anls == 1.0
    assert cell.documents_of("exact_match") == [1.0] * 5


def test_interrupted_runs_resume(
    reader: tuple[Any, Any], pages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    real, started, most = PageReader.read, [], 2

    def counted(reader: PageReader, config: Any, tokens: int) -> Any:
        if len(started) == most:
            raise KeyboardInterrupt
        started.append((config.method, config.budget))
        return real(reader, config, tokens)

    monkeypatch.setattr(PageReader, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        run(reader, pages, output=path)
    assert [cell.key for cell in Results.load(path).cells] == started == [("fullkv", None), ("snapkv", 16)]
    most = 100
    started.clear()
    cells = run(reader, pages, output=path)
    assert started == [("snapkv", 1000), ("sparsemm", 16), ("sparsemm", 1000), ("mask", None)]
    assert len(cells) == 6
    started.clear()
    assert run(reader, pages, output=path) == cells, "nothing is left to do"
    assert run(reader, pages, output=path, budgets=[16, 24, 1000])[2].nominal_budget == 24
    assert started == [("snapkv", 24), ("sparsemm", 24)], "a new budget joins the finished ones"
    started.clear()
    run(reader, pages, output=path, fresh=True, methods=["fullkv"])
    assert started == [("fullkv", None)]
    assert len(Results.load(path).cells) == 1


@pytest.mark.parametrize(
    ("change", "named"), [({"window_size": 5}, "window_size"), ({"batch_size": 5}, "batch_size"), ({}, "pages_digest")]
)
def test_results_of_other_settings_are_not_mixed(
    reader: tuple[Any, Any], pages: list[Any], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "results.json"
    run(reader, pages, output=path, methods=["fullkv"])
    before = path.read_bytes()
    with pytest.raises(DataError, match=named):
        run(reader, pages if change else pages[::-1], output=path, methods=["fullkv"], **change)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["fullkv", "snapkw"]}, "snapkw"),
        ({"methods": []}, "methods is empty"),
        ({"budgets": []}, "needs at least one budget"),
        ({"budgets": [16, 2]}, "window_size=4"),
        ({"head_scores": None}, "head_scores"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"ratoi": 0.1}, "ratoi"),
    ],
)
def test_bad_settings_fail_before_anything_runs(
    reader: tuple[Any, Any], pages: list[Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(reader, pages, output=tmp_path / "results.json", **settings)
    assert not (tmp_path / "results.json").exists()


def test_the_model_is_as_before(reader: tuple[Any, Any], pages: list[Any]) -> None:
    model, processor = reader
    inputs = family_of(model).build_inputs(processor, [pages[0].image], [pages[0].prompt])
    with torch.no_grad():
        before = model(**inputs).logits
        run(reader, pages, methods=["sparsemm"], budgets=[16])
        assert torch.equal(model(**inputs).logits, before)
    assert "get_image_features" not in vars(model.model) and not model.training


@pytest.mark.parametrize("family", ["qwen2-vl", "llava-mistral"])
def test_images_are_encoded_once(family: str, pages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    dims = TINY_MINIATURE if family == "qwen2-vl" else dataclasses.replace(TINY_MINIATURE, patch_size=16)
    model, processor = build_model(family, dims=dims).eval(), build_processor(family, dims)
    tower = model.model.visual if family == "qwen2-vl" else model.model.vision_tower
    calls: list[int] = []
    tower.register_forward_hook(lambda *_: calls.append(1))
    build = family_of(model).build_inputs
    batches = [build(processor, [page.image], [page.prompt]) for page in pages[:2]]
    plain = [generate_greedy(model, inputs, 3)[0] for inputs in batches]
    assert len(calls) == 2
    with remember_image_features(model, capacity=2):
        for _ in range(3):
            again = [generate_greedy(model, inputs, 3)[0] for inputs in batches]
            assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))
    assert len(calls) == 4, "each of the two images once, however often it is asked for"


def test_heldout_pages_spread_tasks_and_words() -> None:
    pages = heldout_pages(16)
    read = [page.num_words for page in pages if page.task == "read"]
    assert sorted(read) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {page.task for page in pages} == {"read", "field"} and len(pages) == 16
    again = heldout_pages(16)
    assert [page.image.tobytes() for page in pages] == [page.image.tobytes() for page in again]
    assert pages[0].answer != heldout_pages(16, seed=1)[0].answer
    with pytest.raises(DataError, match="count=0"):
        heldout_pages(0)


# -- table and plot -------------------------------------------------------------------------------------------------


def cell(method: str, budget: int | None, accuracy: float) -> Cell:
    part = {"accuracy": [accuracy] * 4, "exact_match": [0.0, 0.0, 0.0, 1.0], "anls": [0.5] * 4}
    return Cell(
        method=method,
        nominal_budget=budget,
        effective_budget=budget or 217.0,
        prompt_tokens=217.0,
        documents=8,
        accuracy=accuracy,
        exact_match=0.25,
        anls=0.5,
        scores={"field/2 lines": part, "read/1 words": part},
        new_tokens=3,
        cache_bytes=2048.0 * ((budget or 217) + 3) + 4096,
        full_cache_bytes=2048.0 * 220,
        ms_per_token=None if method == "mask" else spread_of([1.0, 1.5, 2.0]),
        prefill_ms=spread_of([3.0]),
        tokens=64,
    )


CELLS = [
    cell("fullkv", None, 0.9),
    *(cell(method, budget, 0.01 * budget) for method in ("snapkv", "sparsemm", "new_method") for budget in (8, 64)),
    cell("mask", None, 0.4),
]


def test_table_shows_every_cell() -> None:
    lines = format_table(CELLS).splitlines()
    assert len(lines) == 2 + len(CELLS) and len({len(line) for line in lines}) == 1
    columns = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert columns[0][:4] == ["method", "budget", "effective", "accuracy"]
    row = dict(zip(columns[0], columns[3], strict=True))
    assert row["method"] == "snapkv" and row["budget"] == "8" and row["effective"] == "8.00"
    assert row["cache bytes"] == "26,624" and row["ms/token"] == "1.50 (1.25–1.75)"
    assert (row["% of full"], row["slack %"]) == ("5.0", "0.9")  # (8 + 3) / (217 + 3), and 4,096 bytes of 450,560
    assert dict(zip(columns[0], columns[2], strict=True))["% of full"] == "100.0"
    assert row["accuracy: read"] == row["accuracy: field"] == "0.080"
    assert columns[2][1] == "-" and columns[-1][-1] == ""
    with pytest.raises(DataError, match="no result"):
        format_table([])


def test_table_of_a_metric_or_of_a_task() -> None:
    first = [part.strip() for part in format_table(CELLS, metric="anls").splitlines()[0].strip("|").split("|")]
    assert "ANLS: read" in first and "accuracy: read" not in first
    mixed = [cell("fullkv", None, 0.9), cell("snapkv", 8, 0.2)]
    mixed[1].scores["field/2 lines"] = {name: [0.7] for name in ("accuracy", "exact_match", "anls")}
    lines = format_table(mixed, task="field").splitlines()
    assert "accuracy: field" in lines[0] and "read" not in lines[0]
    assert "0.700" in lines[3] and "0.200" not in lines[3]
    with pytest.raises(DataError, match="sums"):
        format_table(mixed, task="sums")


def test_every_task_by_method_and_budget_with_standard_errors() -> None:
    varied = cell("snapkv", 8, 0.2)
    varied.scores["read/1 words"] = {name: [0.0, 0.2, 0.4, 1.0] for name in ("accuracy", "exact_match", "anls")}
    read, field = format_by_budget([cell("fullkv", None, 0.9), varied, cell("adakv", 64, 0.4)]).split("\n\n")
    parts = [[part.strip() for part in line.strip("|").split("|")] for line in read.splitlines()]
    assert parts[0] == ["accuracy: read", "all rows", "8", "64"] and field.startswith("| accuracy: field")
    assert parts[3] == ["snapkv", "", "0.400 ± 0.216", ""]  # sqrt((.16 + .04 + 0 + .36) / 3 / 4), by hand
    assert [line[0] for line in parts[2:]] == ["fullkv", "snapkv", "adakv"] and parts[2][1].startswith("0.900")
    assert parts[4][3].startswith("0.400") and "0.200 ± 0.000" in field


def test_the_best_other_method_is_compared_page_by_page() -> None:
    def scored(method: str, budget: int | None, read: list[float], field: list[float]) -> Cell:
        made = cell(method, budget, 0.5)
        for name, values in (("read/1 words", read), ("field/2 lines", field)):
            made.scores[name] = {metric: values for metric in ("accuracy", "exact_match", "anls")}
        return made

    cells = [
        scored("fullkv", None, [1.0] * 4, [1.0] * 4),
        scored("ours", 8, [0.5, 0.6, 0.7, 0.8], [0.2, 0.1, 0.2, 0.1]),
        scored("a", 8, [0.4, 0.5, 0.5, 0.6], [0.5, 0.4, 0.6, 0.5]),
        scored("b", 8, [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]),
        scored("ours", 64, [0.9] * 4, [0.5, 0.6, 0.5, 0.6]),
        scored("b", 64, [0.9] * 4, [0.4, 0.7, 0.5, 0.6]),
    ]
    pairs = pair_with_best(cells, "ours")
    assert [(pair.task, pair.budget, pair.rival, pair.verdict) for pair in pairs] == [
        ("read", 8, "a", 1), ("read", 64, "b", 0), ("field", 8, "a", -1), ("field", 64, "b", 0),
    ]  # fmt: skip
    first = pairs[0]
    assert (first.mean, first.rival_mean, first.difference) == pytest.approx((0.65, 0.5, 0.15))
    assert first.difference_error == pytest.approx((0.01 / 3) ** 0.5 / 2)  # of .1 .1 .2 .2, by hand
    lines = format_pairs(pairs, "ours").splitlines()
    assert "+0.150 ± 0.029" in lines[2] and lines[2].rstrip(" |").endswith("ahead") and "behind" in lines[4]
    assert lines[-1].startswith("ours: best in 3 of 4 cells; 1 ahead and 1 behind by more than 2 standard errors")
    siblings = [dataclasses.replace(cells[1], method=name) for name in ("rate_distortion", "rate_distortion_mixkv")]
    assert [pair.rival for pair in pair_with_best([*siblings, cells[2]], "rate_distortion_mixkv")] == ["a", "a"]
    with pytest.raises(DataError, match="'fullkv' has no cell with a budget; the results have a, b, ours"):
        pair_with_best(cells, "fullkv")
    with pytest.raises(DataError, match="no other method"):
        pair_with_best(cells[:2], "ours")


def test_description_names_the_settings() -> None:
    settings = {
        "model": "toy", "documents": 8, "batch_size": 4, "dtype": "float32", "device": "cpu", "max_new_tokens": 48,
        "options": {"window_size": 4, "ratio": 0.1, "rounding": "exact", "seed": 0},
    }  # fmt: skip
    text = describe(Results(settings, CELLS))
    for part in ("toy", "8 held-out", "batches of 4", "window 4", "ratio 0.1", "exact", "48 new tokens"):
        assert part in text


def test_plot_is_an_image_with_a_line_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    bars, level = Axes.errorbar, Axes.axhline
    errors: dict[str, Any] = {}

    def draw(axes: Axes, x: Any, y: Any, **options: Any) -> Any:
        drawn[options["label"]], errors[options["label"]] = list(y), options["yerr"]
        return bars(axes, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", draw)
    monkeypatch.setattr(Axes, "axhline", lambda s, y, **k: (drawn.update({k["label"]: [y]}), level(s, y, **k))[1])
    plot_accuracy(CELLS, tmp_path / "new" / "accuracy.png", title="toy")
    with Image.open(tmp_path / "new" / "accuracy.png") as image:
        assert image.width > 600 and image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert drawn.pop("SnapKV") == pytest.approx([0.08, 0.64])
    assert all(each == (0.0, 0.0) for each in errors.values()), "all documents alike"
    plot_accuracy(CELLS, tmp_path / "new" / "exact.png", metric="exact_match", task="read")
    assert errors["SnapKV"] == pytest.approx((0.25, 0.25)), "one of four: sample deviation 0.5, of the mean half of it"
    drawn.clear()
    plot_accuracy(CELLS, tmp_path / "new" / "accuracy.png")
    drawn.pop("SnapKV")
    assert drawn == {
        "Full cache": [0.9], "SparseMM": [0.08, 0.64], "new_method": [0.08, 0.64], "Visual heads masked": [0.4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.png", {"metric": "bleu"}, "bleu"),
        ("a.png", {"task": "sums"}, "sums"),
        ("a.text", {}, "image format"),
    ],
)
def test_plot_refuses(tmp_path: Path, name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plot_accuracy(CELLS, tmp_path / name, **options)
    with pytest.raises(DataError, match="no result has a budget"):
        plot_accuracy(CELLS[:1], tmp_path / "b.png")
    assert not list(tmp_path.iterdir())


def test_result_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="does not exist"):
        Results.load(path)
    path.write_text('{"format": "something else"}')
    with pytest.raises(DataError, match="no result file"):
        Results.load(path)
    path.write_text('{"format": "sparsemm-evaluation", "version": 99}')
    with pytest.raises(DataError, match="99"):
        Results.load(path)
    incomplete = {name: value for name, value in CELLS[0].to_dict().items() if name != "anls"}
    with pytest.raises(DataError, match="anls"):
        Cell.from_dict(incomplete)

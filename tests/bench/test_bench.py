"""The end-to-end benchmark on a small model: counts are exact, results resume, tables and figure are there."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time

import pytest
import torch
from greedy_runs import assert_close, text_inputs
from toy_models import toy_model
from typer.testing import CliRunner

import sparsemm
from sparsemm.bench import e2e, efficiency, kernel_calls, steps
from sparsemm.bench.baselines import CopyingLoop, kvpress_snapkv
from sparsemm.bench.cells import BenchCell, BenchResults, duration
from sparsemm.bench.efficiency import PAPER_SPEEDUP, format_tables, plot_efficiency
from sparsemm.bench.host import VICUNA, layer_costs, token_overhead
from sparsemm.bench.measure import measure
from sparsemm.bench.memory import copy_bandwidth, peak_new_bytes, row_bytes, step_weight_bytes, weight_bytes
from sparsemm.bench.shapes import (
    AttentionShape,
    attention_shape,
    prompt_inputs,
    random_model,
    shape_config,
    skewed_head_scores,
)
from sparsemm.bench.throughput import largest_batch
from sparsemm.cli import app
from sparsemm.decoding import DecodeLoop
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.runs.spread import spread_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny", device=CPU, dtype=torch.float32)


def snapkv(budget=48):
    return sparsemm.CompressionConfig("snapkv", budget)


# -- models and prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "billions"),
    [
        ("vicuna-7b", (32, 32, 32, 128), 7.06),
        ("mistral-7b", (32, 32, 8, 128), 7.57),
        ("qwen2-vl-7b", (28, 28, 4, 128), 8.29),
    ],
)
def test_shapes_are_those_of_the_checkpoints(name, shape, billions):
    import transformers

    config = shape_config(name)
    assert attention_shape(config) == AttentionShape(*shape)
    with torch.device("meta"):
        model = getattr(transformers, family_of(config).model_class)._from_config(config, dtype=torch.bfloat16)
    text = config.get_text_config()
    head_dim = model.model.language_model.layers[0].self_attn.head_dim
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, head_dim) == shape
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    layers, _, kv_heads, head_dim = shape
    assert row_bytes(model) == 2 * layers * kv_heads * head_dim * 2


@pytest.mark.parametrize("shape", [(32, 32), (28, 28)])
def test_skewed_scores_are_as_concentrated_as_the_release(shape):
    values = skewed_head_scores(*shape).values.flatten()
    count = values.numel()
    ranked = values.sort(descending=True).values / values.sum()
    assert float(ranked[: round(0.05 * count)].sum()) == pytest.approx(0.55, abs=0.005)
    assert float(ranked[0] * count) == pytest.approx(26, abs=0.5)
    assert int((values == 0).sum()) == round(0.01 * count)
    assert torch.equal(values, skewed_head_scores(*shape).values.flatten())
    assert int(values.argmax()) > 0, "places are drawn"


@pytest.mark.parametrize("model_name", ["tiny", "qwen2-vl", "llava-mistral"])
def test_prompts_have_exactly_the_tokens_asked_for(model_name, tiny):
    model = tiny if model_name == "tiny" else toy_model(model_name)
    for tokens in (2, 40, 150):
        inputs = prompt_inputs(model, tokens, 2)
        assert inputs["input_ids"].shape == (2, tokens)
        shown = (inputs["input_ids"] == model.config.image_token_id).sum(1)
        assert ("pixel_values" in inputs) == bool(shown.any())
        if tokens == 150:
            assert int(shown[0]) > 20
        assert sparsemm.generate(model, inputs, snapkv(), max_new_tokens=2).new_tokens.shape == (2, 2)
    with pytest.raises(ConfigError, match="too short"):
        prompt_inputs(model, 1)
    with pytest.raises(ConfigError, match="neither a folder"):
        random_model("vicuna-8b", device=CPU, dtype=torch.float32)


# -- one measurement -----------------------------------------------------------------------------------------------


def test_bytes_and_operators_of_a_measurement_are_exact(tiny):
    inputs, steps, warmup = prompt_inputs(tiny, 120), 6, 2
    times, found = measure(tiny, inputs, "snapkv", snapkv(), steps=steps, warmup=warmup)
    lists, row, layers = 8, 2 * 32 * 4, 4
    slots = layers * lists * (48 + steps + warmup + 1 + 8)
    assert found["cache_bytes"] == slots * row + layers * 4 * (4 * lists + 2)
    assert found["full_cache_bytes"] == (120 + steps + warmup) * layers * lists * row
    assert found["effective_budget"] == 48
    assert len(times["step"]) == steps and min(times["step"]) > 0
    assert len(times["first_token"]) == 4
    times, longer = measure(tiny, prompt_inputs(tiny, 300), "snapkv", snapkv(), steps=2, warmup=0)
    assert (longer["operators"], longer["launches"]) == (found["operators"], found["launches"])
    _, stock = measure(tiny, inputs, "hf", sparsemm.CompressionConfig("fullkv"), steps=3, warmup=1)
    assert stock["launches"] > found["launches"]
    assert stock["cache_bytes"] is None
    assert weight_bytes(tiny) + found["cache_bytes"] < found["peak_bytes"] < stock["peak_bytes"]
    assert not hasattr(tiny.model.language_model.layers[0].self_attn, "_old_forward")


def test_bytes_that_a_step_reads(tiny):
    parameters = dict(tiny.named_parameters())
    language = sum(p.nbytes for name, p in parameters.items() if name.startswith("model.language_model.layers"))
    head = parameters["lm_head.weight"].nbytes + parameters["model.language_model.norm.weight"].nbytes
    assert step_weight_bytes(tiny) == language + head
    buffers = sum(buffer.nbytes for buffer in tiny.buffers())
    assert weight_bytes(tiny) == sum(p.nbytes for p in parameters.values()) + buffers
    assert row_bytes(tiny) == 2 * 32 * 8 * 4 * 4
    assert copy_bandwidth(CPU, 1 << 20) > 1e8


def test_copying_every_row_at_every_token_gives_the_same_text():
    model = toy_model("llava-mistral")
    inputs = text_inputs(60, batch=2)
    with sparsemm.patch(model, sparsemm.CompressionConfig("adakv", 12, window_size=8)) as handle:
        expected = sparsemm.generate(model, inputs, max_new_tokens=20).sequences
        loop = CopyingLoop(handle)
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, custom_generate=loop), expected)
        layer = loop.cache.layers[0]
        lists, kept = 4, 2 * 2 * 12
        assert layer.key_buffer.shape[0] == kept + lists * (1 + 19)  # one spare slot a list, one for every token


def test_time_steps_are_noted_only_when_asked(tiny):
    with sparsemm.patch(tiny, snapkv()) as handle:
        for asked in (False, True):
            loop = DecodeLoop(handle, time_steps=asked)
            loop.generate(**prompt_inputs(tiny, 60), max_new_tokens=5)
            assert len(loop.step_seconds) == (4 if asked else 0)
            assert loop.decode_seconds >= sum(loop.step_seconds) > -1


def test_the_first_token_waits_for_the_vision_tower(tiny, monkeypatch):
    """transformers encodes images before it calls a loop that it was given."""
    inputs, encode = prompt_inputs(tiny, 150), tiny.model.get_image_features
    assert "pixel_values" in inputs

    @functools.wraps(encode)  # transformers reads its parameters
    def slowly(*args, **kwargs):
        time.sleep(0.5)
        return encode(*args, **kwargs)

    monkeypatch.setattr(tiny.model, "get_image_features", slowly)
    for method in ("hf", "snapkv", "original"):
        times, _ = measure(tiny, inputs, method, snapkv(), steps=2, warmup=1)
        assert min(times["first_token"]) > 0.5
    assert sparsemm.generate(tiny, inputs, snapkv(), max_new_tokens=2).prefill_seconds > 0.5


def test_peak_of_tensors_alive_at_once():
    def run():
        first = torch.zeros(1000)  # 4,000 bytes
        second = first.view(10, 100) + 1  # 8,000 together, and a view is none
        del first
        third = second.double()  # 4,000 and 8,000
        del second
        return third.sum()

    assert peak_new_bytes(run) == 12000
    assert peak_new_bytes(lambda: [torch.zeros(1000) for _ in range(3)]) == 12000
    assert peak_new_bytes(lambda: [torch.zeros(1000).sum() for _ in range(3)]) == 4000 + 4 * 3


# -- the largest batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hf", "fullkv", "snapkv"])
def test_the_largest_batch_is_what_the_limit_holds(tiny, method):
    inputs = prompt_inputs(tiny, 200)
    config = snapkv() if method == "snapkv" else sparsemm.CompressionConfig("fullkv")
    weights = weight_bytes(tiny)
    limit = weights + 8_000_000
    times, found = largest_batch(tiny, inputs, method, config, steps=2, limit_bytes=limit)
    assert found["largest_batch"] == int(0.9 * 8_000_000 / found["bytes_per_sequence"])
    assert found["tokens_per_second"] == pytest.approx(found["largest_batch"] / statistics.median(times["step"]))
    if method == "snapkv":  # rows kept, slots for the steps, and the index tensors
        assert found["bytes_per_sequence"] == 4 * 8 * (48 + 6) * 2 * 32 * 4 + 4 * 4 * 34
    with pytest.raises(ConfigError, match="does not fit"):
        largest_batch(tiny, inputs, method, config, steps=2, limit_bytes=weights + 1000)


def test_a_repeated_cache_decodes_each_copy_as_the_one(tiny):
    from sparsemm.bench.throughput import _prepare_ours

    inputs = prompt_inputs(tiny, 80)
    with sparsemm.patch(tiny, snapkv()) as handle:
        logits = []
        for batch in (1, 3):
            _, runner = _prepare_ours(tiny, handle, inputs, batch, 4)
            for _ in range(3):
                runner()
            logits.append(runner.body.__closure__[0].cell_contents.logits)
    for row in range(3):
        assert_close(logits[1][row], logits[0][0])


# -- the grid ------------------------------------------------------------------------------------------------------


def small_run(model, path, methods=("hf", "fullkv", "sparsemm", "original"), **options):
    workloads = e2e.make_workloads(methods, [40], [64, 128], [1, 2], [128])
    return e2e.run(
        model, workloads, model_name="tiny", steps=3, warmup=1, output=path, progress=False,
        limit_bytes=weight_bytes(model) + 4_000_000, **options
    )  # fmt: skip


def test_the_grid():
    pairs = e2e.make_workloads(["hf", "mask", "snapkv", "kvpress"], [32, 64], [128], [1], [128])
    latency = [(each["method"], each["budget"]) for each in pairs if each["kind"] == "latency"]
    assert latency == [("hf", None), ("mask", None), ("snapkv", 32), ("snapkv", 64), ("kvpress", 32), ("kvpress", 64)]
    throughput = [(each["method"], each["budget"]) for each in pairs if each["kind"] == "throughput"]
    assert throughput == [("hf", None), ("mask", None), ("snapkv", 32), ("snapkv", 64)]
    with pytest.raises(ConfigError, match="'snap' is unknown"):
        e2e.make_workloads(["snap"], [32], [128], [1], [])
    with pytest.raises(ConfigError, match="prompts holds 0"):
        e2e.make_workloads(["hf"], [32], [0], [1], [])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The file of a run that measured all its cells."""
    path = tmp_path_factory.mktemp("finished") / "results.json"
    assert small_run(tiny, path) == BenchResults.load(path)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copy(finished, tmp_path / "results.json")


def test_finished_cells_are_kept(tiny, copied, monkeypatch):
    path, results = copied, BenchResults.load(copied)
    assert len(results.runs) == len({cell.key for cell in results.runs}) == 4 * 2 * 2 + 3
    assert {cell.status for cell in results.runs} == {"ok"}
    for cell in results.runs:
        times, figures = cell.times["step"], cell.figures
        assert times["q25"] <= times["median"] <= times["q75"] and times["count"] == 3
        if cell.place["kind"] == "latency":
            assert figures["floor_share"] == pytest.approx(figures["floor_seconds"] / times["median"])
            assert figures["tokens_per_second"] == pytest.approx(cell.place["batch"] / times["median"])
            if cell.place["method"] == "sparsemm":
                assert figures["effective_budget"] == 40
                assert figures["launches"] > 0
    # an interrupted run: the last cells are missing
    document = json.loads(path.read_text())
    del document["cells"][-3:]
    path.write_text(json.dumps(document))
    measured = []
    original = e2e.largest_batch
    monkeypatch.setattr(e2e, "largest_batch", lambda *args, **kw: measured.append(args[2]) or original(*args, **kw))
    again = small_run(tiny, path)
    assert measured == ["hf", "fullkv", "sparsemm"]
    assert again.runs[:-3] == results.runs[:-3]
    assert len(again.runs) == len(results.runs)
    with pytest.raises(DataError, match="other settings"):
        e2e.run(tiny, [], model_name="another", output=path)
    path.write_text("{}")
    with pytest.raises(DataError, match="no result file"):
        small_run(tiny, path)


def test_what_is_going_to_be_done_is_said_at_once(tiny, tmp_path):
    said = []
    run = functools.partial(small_run, tiny, tmp_path / "results.json", ("hf",), report=said.append)
    run()
    (plan,) = said
    assert plan.startswith("5 of 5 cells to measure, about ") and "each on this device, " in plan
    run()
    assert said[1:] == [f"nothing is left to do: {tmp_path / 'results.json'} holds all 5 cells"]
    assert [duration(each) for each in (0.2, 40, 600, 9000)] == ["1 s", "40 s", "10 min", "2.5 h"]


def test_a_noisy_cell_is_measured_again(tiny, copied, monkeypatch):
    said, before = [], BenchResults.load(copied)
    document = json.loads(copied.read_text())
    calm = {"median": 1.0, "q25": 0.9, "q75": 1.1, "count": 3}
    for cell in document["cells"]:
        cell["times"] = dict.fromkeys(cell["times"], calm)
    document["cells"][1]["times"]["step"] = {**calm, "q75": 1.5}
    copied.write_text(json.dumps(document))
    monkeypatch.setattr("sparsemm.runs.spread.NOISY", 0.5)
    assert format_tables(BenchResults.load(copied)).count("noisy") == 1
    real = e2e.measure
    monkeypatch.setattr(e2e, "measure", lambda *a, **k: ({"first_token": [2.0], "step": [2.0, 2.1]}, real(*a, **k)[1]))
    after = small_run(tiny, copied, report=said.append)
    assert said[0].startswith("1 of 19 cells")
    assert [cell.key for cell in after.runs] == [cell.key for cell in before.runs]
    assert [cell.times["step"]["median"] for cell in after.runs] == [1.0, 2.05] + [1.0] * 17
    assert after == BenchResults.load(copied)


def test_every_cell_is_warmed_up_by_a_short_prompt_and_tells_how_far_it_is(tiny, monkeypatch):
    lengths, told = [], []
    real = type(tiny).generate
    monkeypatch.setattr(
        type(tiny), "generate", lambda self, **k: (lengths.append(k["input_ids"].shape[1]), real(self, **k))[1]
    )
    for method in ("hf", "snapkv"):
        lengths.clear()
        told.clear()
        measure(tiny, prompt_inputs(tiny, 100), method, snapkv(), steps=3, warmup=1, tell=told.append)
        assert lengths[:6] == [64, *[100] * 5], method
        assert {"prompt, run 1", "prompt, run 4", "token 5 of 5"} <= set(told), method


def test_a_baseline_that_is_missing_does_not_end_the_run(tiny):
    with pytest.raises(ConfigError, match="not installed"), kvpress_snapkv(tiny, 40, 32, 64):
        pass
    workloads = e2e.make_workloads(["kvpress", "snapkv"], [40], [64], [1], [])
    cells = e2e.run(tiny, workloads, model_name="tiny", steps=2, warmup=0, progress=False).runs
    assert "not installed" in cells[0].status
    assert cells[1].status == "ok"


def test_tables_and_figure(finished, tmp_path, monkeypatch):
    results = BenchResults.load(finished)
    text = format_tables(results)
    assert text.count("\n") + 1 == 2 + 16 + 1 + 2 + 3
    assert "paper" not in text
    with monkeypatch.context() as patched:
        drawn = []
        patched.setattr(efficiency, "draw_panels", lambda rows, *args, **options: drawn.extend(rows[0]))
        plot_efficiency(results, tmp_path / "efficiency.svg")
    assert len({panel.group for panel in drawn}) == len(drawn) == 2, "time and memory share no range"
    plot_efficiency(results, tmp_path / "efficiency.svg")
    assert "<svg" in (tmp_path / "efficiency.svg").read_text()
    with pytest.raises(DataError, match="image format"):
        plot_efficiency(results, tmp_path / "efficiency.txt")
    results.runs.append(BenchCell(results.runs[0].place, "out of memory"))
    assert "out of memory" in format_tables(results)
    results.runs.clear()
    with pytest.raises(DataError, match="nothing to draw"):
        plot_efficiency(results, tmp_path / "efficiency.svg")
    with pytest.raises(DataError, match="no result"):
        format_tables(results)


def test_measured_figures_stand_beside_the_papers():
    def cell(method, prompt, ms, peak, budget=None):
        figures = dict(tokens_per_second=1.0, graph=True, floor_share=0.5, cache_bytes=1, rest_bytes=1, kernels=9)
        place = dict(kind="latency", method=method, budget=budget, prompt_tokens=prompt, batch=1)
        times = {"first_token": spread_of([1.0]), "step": spread_of([ms / 1000])}
        return BenchCell(place, "ok", times, {**figures, "peak_bytes": peak, "launches": 9})

    cells = [
        cell("hf", 32768, 40.0, 33_000_000_000),
        cell("fullkv", 32768, 20.0, 32_000_000_000),
        cell("sparsemm", 32768, 8.0, 16_000_000_000, 256),
        cell("snapkv", 16384, 9.0, 15_000_000_000, 256),
    ]
    text = format_tables(BenchResults({"model": "vicuna-7b"}, cells))
    rows = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:4]]
        for line in text.splitlines()
        if line
    }
    assert rows["speed-up over the full cache by model.generate, 32K"] == ["1.87", "5.00"]
    assert rows["speed-up over the full cache by the same loop, 32K"] == ["1.87", "2.50"]
    assert rows["speed-up over the full cache by model.generate, 8K"] == [str(PAPER_SPEEDUP[8192]), ""]
    assert rows["peak GB at 32K, sparsemm"] == ["17.38", "16.00"]
    assert rows["ms/token at 16K, snapkv"] == ["35.3", "9.00"]
    assert rows["ms/token at 16K, fullkv"] == ["52.9", ""]


# -- what the method costs on the host -----------------------------------------------------------------------------


def test_layer_costs_keep_the_rows_of_the_plain_way():
    times, figures = layer_costs(
        **{**VICUNA, "num_heads": 4, "num_kv_heads": 2, "prompt_tokens": 300, "budget": 64}, repeats=1
    )
    assert figures["rows_kept"] == figures["rows_by_formula"] == 128
    assert figures["bytes_held"] == figures["bytes_by_formula"]
    assert figures["compress_ratio"] == times["compress_per_head"][0] / times["compress"][0]
    assert all(figures[name] > 0 for name in ("append_ratio", "append_flat_ratio"))


def test_the_plain_way_chooses_the_rows_of_the_package():
    from sparsemm.bench.host import _per_head

    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(1, heads, 90, 16, generator=generator) for heads in (4, 2, 2))
    config = snapkv(40)
    positions = sparsemm.select_positions(query, key, config, layer_idx=0, num_layers=1)[0]
    for head, (keys, values) in enumerate(_per_head(query, key, value, [40, 40], config)):
        assert torch.equal(keys, key[0, head, positions[head]])
        assert torch.equal(values, value[0, head, positions[head]])


def test_token_overhead_reports_every_way(tiny):
    times, figures = token_overhead(tiny, prompt_tokens=40, tokens=4, rounds=1, budget=16)
    for name in ("patched", "patched_full_cache", "own_loop"):
        assert figures[f"{name}_ratio"] == times[name][0] / times["unpatched"][0]


# -- the program ---------------------------------------------------------------------------------------------------


def test_the_command_writes_tables_and_figure(tmp_path):
    arguments = ["bench", "e2e", "--model", "tiny", "--methods", "hf,snapkv", "--budgets", "40", "--prompts", "64"]
    options = ["--steps", "2", "--warmup", "0", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| snapkv" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "efficiency.png"}


def test_the_host_command(tmp_path, monkeypatch):
    small = {**steps.SMALL, "num_hidden_layers": 2}
    monkeypatch.setattr(steps, "MIDDLE", small)
    monkeypatch.setattr(steps, "LANGUAGE_MODELS", ("llama",))
    short = functools.partial(token_overhead, prompt_tokens=40, tokens=4, budget=16)
    monkeypatch.setattr("sparsemm.bench.host.token_overhead", short)
    arguments = ["bench", "host", "--model", "tiny", "--rounds", "1", "--prompt-tokens", "128", "--budget", "48"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "host.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    layer, token, kernels, *by_dtype = BenchResults.load(tmp_path / "host.json").runs
    assert layer.figures["rows_kept"] == 48 * 32 and layer.times["compress"]["count"] == 9
    assert json.loads(result.stdout)["token"]["own_loop_ratio"] == token.figures["own_loop_ratio"]
    assert kernels.figures["llama, float32"] == {"inside": 12, "outside": 7}
    for cell in by_dtype[2:]:
        assert set(cell.figures) == {f"{name}, batch {batch}" for name in kernel_calls.ONE_TOKEN for batch in (1, 16)}
        silu = "silu_mul, batch 16"
        assert cell.times[f"{silu}, pytorch"]["count"] == cell.times[f"{silu}, sparsemm"]["count"] == 15
    for cell in by_dtype[:2]:
        assert set(cell.times) == {"step", "matrices", "stock"} and cell.figures["over_matrices"] > 0

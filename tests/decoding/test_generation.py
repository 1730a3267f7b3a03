"""`sparsemm.generate` against `model.generate` under the same patch, its step under a graph's contract, its memory."""

from __future__ import annotations

import gc

import pytest
import torch
from graph_emulation import EmulatedGraphs
from greedy_runs import assert_close, config, scores, text_inputs
from toy_models import FAMILIES, IMAGE_ID, toy_inputs, toy_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    Qwen3Config,
    StoppingCriteria,
    StoppingCriteriaList,
)

import sparsemm
from sparsemm.bench.memory import peak_new_bytes
from sparsemm.bench.operators import count_operators
from sparsemm.decoding import DecodeLoop, DecodeStep, StepRunner, graph, loop, tiled_prompt, why_no_graph
from sparsemm.errors import CacheError, ConfigError, PatchError

SAMPLING = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=30, repetition_penalty=1.3)
ENDS = list(range(50, 60))  # end tokens that random text of the toy models meets soon, in each row at its own time


def settings_of(model, method, budget=12):
    table = scores(model) if method in ("sparsemm", "mask") else None
    return config(method, None if method in ("fullkv", "mask") else budget, head_scores=table)


@pytest.fixture
def emulated_graphs(monkeypatch):
    made = []

    def make(device):
        made.append(EmulatedGraphs(device))
        return made[-1]

    monkeypatch.setattr(loop, "CudaGraphs", make)
    monkeypatch.setattr(loop, "why_no_graph", lambda *args: None)
    return made


# -- the same tokens as transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fullkv", "snapkv", "adakv", "sparsemm", "mask"])
def test_greedy_tokens_are_those_of_transformers(family, method):
    model = toy_model(family)
    with sparsemm.patch(model, settings_of(model, method)):
        for batch in (1, 3):
            inputs = toy_inputs(model, batch)
            expected = model.generate(**inputs, max_new_tokens=30)
            actual = sparsemm.generate(model, inputs, max_new_tokens=30)
            assert torch.equal(actual.sequences, expected)
            assert torch.equal(actual.new_tokens, expected[:, inputs["input_ids"].shape[1] :])
            assert actual.cache.get_seq_length() == expected.shape[1] - 1
            assert not actual.graph
            assert actual.captures == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_finish_early_are_padded(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 3)
    model.generation_config.eos_token_id = ENDS
    with sparsemm.patch(model, config("snapkv", 12)):
        expected = model.generate(**inputs, max_new_tokens=60)
        actual = sparsemm.generate(model, inputs, max_new_tokens=60)
    new = expected[:, inputs["input_ids"].shape[1] :]
    lengths = {int(torch.isin(row, torch.tensor(ENDS)).int().argmax()) for row in new}
    assert len(lengths) > 1, "choose end tokens that rows meet at different times"
    assert torch.equal(actual.sequences, expected)
    assert actual.cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_the_tokens_of_transformers(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 3)

    class Record(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, logits):
            self.seen.append((input_ids.clone(), logits.clone()))
            return logits

    with sparsemm.patch(model, config("snapkv", 12)):
        records = Record(), Record()
        torch.manual_seed(3)
        expected = model.generate(
            **inputs, max_new_tokens=20, **SAMPLING, logits_processor=LogitsProcessorList([records[0]])
        )
        torch.manual_seed(3)
        actual = sparsemm.generate(
            model, inputs, max_new_tokens=20, **SAMPLING, logits_processor=LogitsProcessorList([records[1]])
        )
    assert torch.equal(actual.sequences, expected)
    assert len(records[0].seen) == len(records[1].seen) == 20
    for (ids_a, logits_a), (ids_b, logits_b) in zip(records[0].seen, records[1].seen, strict=True):
        assert torch.equal(ids_a, ids_b)
        assert_close(logits_b, logits_a)


STANDARD = [
    SAMPLING,
    dict(do_sample=True, temperature=0.7),
    dict(do_sample=True, top_k=5, top_p=0.8),
    dict(do_sample=False, repetition_penalty=1.8),
]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("options", STANDARD)
def test_standard_sampling_is_part_of_the_step(options, captured, request):
    """The tokens of transformers for a seed, end tokens included; replayed as well."""
    made = request.getfixturevalue("emulated_graphs") if captured else None
    model = toy_model("llava-mistral")
    model.generation_config.eos_token_id = ENDS
    inputs = toy_inputs(model, 3)
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        torch.manual_seed(5)
        expected = model.generate(**inputs, max_new_tokens=40, **options)
        run = DecodeLoop(handle)
        torch.manual_seed(5)
        found = model.generate(**inputs, max_new_tokens=40, **options, custom_generate=run)
        assert torch.equal(found, expected)
    assert run.runner.body is not run.step, "the choice is part of what is captured"
    assert not captured or made[0].replays > 0


def test_other_processors_run_behind_the_step():
    model = toy_model("llava-mistral")
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        for options in (dict(do_sample=True, min_p=0.1), dict(bad_words_ids=[[5]])):
            run = DecodeLoop(handle)
            model.generate(**toy_inputs(model, 1), max_new_tokens=4, **options, custom_generate=run)
            assert run.runner.body is run.step


def test_sequences_that_have_ended_cost_no_attention(monkeypatch):
    model = toy_model("llava-mistral")
    model.generation_config.eos_token_id = ENDS
    seen, original = [], sparsemm.cache.SparseLayer.decode

    def note(self, query, scale, num_later):
        if self.layer_idx == 0:
            seen.append([] if num_later is None else num_later.flatten().bool().tolist())
        return original(self, query, scale, num_later)

    monkeypatch.setattr(sparsemm.cache.SparseLayer, "decode", note)
    inputs = toy_inputs(model, 3)
    output = sparsemm.generate(model, inputs, config("snapkv", 12), max_new_tokens=60)
    ended = torch.isin(output.new_tokens, torch.tensor(ENDS)).int().cummax(1).values.bool()
    assert ended.any() and not ended.all()
    assert seen[-(ended.shape[1] - 1) :] == ended.T[:-1].tolist()


def test_several_samples_of_a_prompt_and_stopping_criteria():
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 2)

    class Even(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids.shape[1] > 45) & (input_ids[:, -1] % 2 == 0)

    criteria = StoppingCriteriaList([Even(), MaxTimeCriteria(1000)])
    with sparsemm.patch(model, config("snapkv", 12)):
        for options in (dict(num_return_sequences=2, **SAMPLING), {}):
            torch.manual_seed(1)
            expected = model.generate(**inputs, max_new_tokens=40, stopping_criteria=criteria, **options)
            torch.manual_seed(1)
            actual = sparsemm.generate(model, inputs, max_new_tokens=40, stopping_criteria=criteria, **options)
            assert torch.equal(actual.sequences, expected)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 40


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_continues_either_way(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 1)
    with sparsemm.patch(model, config("snapkv", 12)):
        first = sparsemm.generate(model, inputs, max_new_tokens=9)
        ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        stock = model.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True)
        expected = model.generate(**turn, max_new_tokens=70, past_key_values=stock.past_key_values)
        actual = sparsemm.generate(model, turn, max_new_tokens=70, past_key_values=first.cache)
    assert torch.equal(first.sequences, stock.sequences)
    assert torch.equal(actual.sequences, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_callers_own_empty_cache_is_filled(family):
    model = toy_model(family)
    inputs = toy_inputs(model, 1)
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        expected = model.generate(**inputs, max_new_tokens=9)
        for cache in (DynamicCache(config=model.config.text_config), DynamicCache(), handle.new_cache()):
            out = sparsemm.generate(model, inputs, max_new_tokens=9, past_key_values=cache)
            assert out.cache is cache and torch.equal(out.sequences, expected)
            assert cache.get_seq_length() == expected.shape[1] - 1
            ids = torch.cat([out.sequences, torch.tensor([[30, 31]])], dim=1)
            more = sparsemm.generate(model, {"input_ids": ids}, max_new_tokens=3, past_key_values=cache)
            assert more.cache is cache


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_the_caller_has_embedded(family):
    model = toy_model(family)
    inputs = text_inputs(20, batch=2)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    with sparsemm.patch(model, config("snapkv", 12)):
        whole = sparsemm.generate(model, inputs, max_new_tokens=7)
        expected = model.generate(**embedded, max_new_tokens=7)
        actual = sparsemm.generate(model, embedded, max_new_tokens=7)
    assert torch.equal(actual.sequences, expected)
    assert torch.equal(actual.new_tokens, whole.new_tokens)
    assert actual.prompt_columns == 0 and actual.stats.prompt_tokens == [20, 20]


def test_one_token_and_streaming():
    model = toy_model("llava-vicuna")
    inputs = toy_inputs(model, 2)
    seen = []
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        one = sparsemm.generate(model, inputs, max_new_tokens=1)
        assert one.new_tokens.shape == (2, 1)
        assert one.ms_per_token is None
        many = sparsemm.generate(model, inputs, max_new_tokens=12, streamer=seen.append)
        assert handle.stats.prompt_tokens == many.stats.prompt_tokens

        class Streamer:
            def __init__(self):
                self.values, self.ended = [], False

            def put(self, value):
                self.values.append(value)

            def end(self):
                self.ended = True

        ours, stock = Streamer(), Streamer()
        single = toy_inputs(model, 1)
        sparsemm.generate(model, single, max_new_tokens=6, streamer=ours)
        model.generate(**single, max_new_tokens=6, streamer=stock)
    assert torch.equal(torch.stack(seen, dim=1), many.new_tokens)
    assert ours.ended
    assert len(ours.values) == len(stock.values)
    assert all(torch.equal(a, b) for a, b in zip(ours.values, stock.values, strict=True))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 4.0},
             {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0}],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotations_that_widen_while_tokens_are_generated(rope):
    """Every step has the frequencies of its own length, not of the last one's: 32 positions were trained."""
    settings = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, eos_token_id=None,
        rope_parameters={**rope, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = text_inputs(28)
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    with sparsemm.patch(model, config("fullkv", None)):
        assert torch.equal(sparsemm.generate(model, inputs, max_new_tokens=24).sequences, expected)


def test_what_is_refused():
    model = toy_model("llava-mistral")
    inputs = toy_inputs(model, 1)
    with pytest.raises(PatchError, match="not patched"):
        sparsemm.generate(model, inputs)
    assert sparsemm.generate(model, inputs, config("snapkv", 12), max_new_tokens=2).new_tokens.shape == (1, 2)
    with sparsemm.patch(model, config("snapkv", 12)):
        for options, message in (
            ({"num_beams": 2}, "beam_search"),
            ({"use_cache": False}, "use_cache"),
            ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
            ({"graph": True}, "not on a GPU"),
            ({"reserve": 0}, "reserve"),
            ({"prompt_tile": -1}, "prompt_tile"),
            ({"assistant_model": model}, "own loop"),
            ({"decode_backend": "cpu"}, "belongs to the patch"),
        ):
            with pytest.raises(ConfigError, match=message):
                sparsemm.generate(model, inputs, max_new_tokens=4, **options)
        for kind in ("static", "offloaded"):
            with pytest.raises(CacheError, match="cache_implementation"):
                sparsemm.generate(model, inputs, max_new_tokens=4, cache_implementation=kind)
        with pytest.raises(PatchError, match="patched already"):
            sparsemm.generate(model, inputs, config("snapkv", 12))
        with pytest.raises(ConfigError, match="meta device, without weights"):
            sparsemm.generate(toy_model("llava-mistral").to("meta"), inputs, config("snapkv", 12))
        assert sparsemm.generate(model, inputs, max_new_tokens=4).new_tokens.shape == (1, 4)


def test_decode_backends_by_name(monkeypatch):
    model = toy_model("llava-mistral")
    inputs = toy_inputs(model, 2)
    expected = sparsemm.generate(model, inputs, config("snapkv", 12), max_new_tokens=12).sequences
    calls = []
    original = sparsemm.ops.reference.varlen_decode
    monkeypatch.setattr(
        sparsemm.ops.backends.reference, "varlen_decode", lambda *args: calls.append(1) or original(*args)
    )
    sparsemm.cache.layer._varlen_decode.cache_clear()
    named = sparsemm.generate(model, inputs, config("snapkv", 12), max_new_tokens=12, decode_backend="reference")
    sparsemm.cache.layer._varlen_decode.cache_clear()
    assert len(calls) == 2 * 11
    assert torch.equal(named.sequences, expected)
    for name, message in (("cuda", "needs a GPU"), ("fast", "unknown")):
        with pytest.raises(ConfigError, match=message):
            sparsemm.patch(model, config("snapkv", 12), decode_backend=name)
    assert "forward" not in vars(model.model.language_model.layers[0].self_attn)


def test_an_observer_sees_the_rows_of_every_step():
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 1)
    seen = {"ours": [], "stock": []}

    def observer(name):
        return lambda layer_idx, query, layer: seen[name].append(
            (layer_idx, layer.get_seq_length(), layer.top_columns(query[:, :, -1:]))
        )

    with sparsemm.patch(model, sparsemm.CompressionConfig("fullkv")) as handle:
        for name, run in (("ours", lambda **kw: sparsemm.generate(model, inputs, reserve=3, **kw)),
                          ("stock", lambda **kw: model.generate(**inputs, **kw))):  # fmt: skip
            handle.observer = observer(name)
            run(max_new_tokens=7)
    assert len(seen["ours"]) == len(seen["stock"]) == 2 * 7
    for ours, stock in zip(seen["ours"], seen["stock"], strict=True):
        assert ours[:2] == stock[:2]
        assert torch.equal(ours[2], stock[2])


# -- the step as a graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fullkv", "adakv", "mask"])
def test_a_replayed_step_gives_the_tokens(family, method, emulated_graphs):
    """Capture and replay on fixed tensors only, buffers sized for the answer, and too small: grown and recaptured."""
    model = toy_model(family)
    inputs = toy_inputs(model, 3)
    with sparsemm.patch(model, settings_of(model, method)):
        expected = model.generate(**inputs, max_new_tokens=90)
        for reserve, captures in ((None, 1), (3, 3)):
            actual = sparsemm.generate(model, inputs, max_new_tokens=90, reserve=reserve)
            assert torch.equal(actual.sequences, expected)
            assert actual.graph
            assert actual.captures == captures
            assert emulated_graphs[-1].replays == 88  # one token is the prompt's, one the warm-up's
            assert actual.stats.cache_bytes == actual.cache.memory_bytes()
        torch.manual_seed(5)
        drawn = model.generate(**inputs, max_new_tokens=20, **SAMPLING)
        torch.manual_seed(5)
        assert torch.equal(sparsemm.generate(model, inputs, max_new_tokens=20, **SAMPLING).sequences, drawn)


def test_a_replayed_step_notices_end_tokens(emulated_graphs):
    model = toy_model("llava-vicuna")
    inputs = toy_inputs(model, 3)
    model.generation_config.eos_token_id = ENDS
    with sparsemm.patch(model, config("snapkv", 12)):
        expected = model.generate(**inputs, max_new_tokens=60)
        actual = sparsemm.generate(model, inputs, max_new_tokens=60)
    assert actual.graph
    assert torch.equal(actual.sequences, expected)


def test_the_cache_after_replays_continues_as_any_other(emulated_graphs):
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)):
        first = sparsemm.generate(model, inputs, max_new_tokens=9)
        ids = torch.cat([first.sequences, torch.full((2, 2), 33)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        stock = model.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True)
        expected = model.generate(**turn, max_new_tokens=9, past_key_values=stock.past_key_values)
        actual = model.generate(**turn, max_new_tokens=9, past_key_values=first.cache)
        assert torch.equal(actual, expected)
        first.cache.crop(-9)
        stock.past_key_values.crop(-9)
        for ours, theirs in zip(first.cache.layers, stock.past_key_values.layers, strict=True):
            assert torch.equal(ours.lens, theirs.lens)
            assert ours.seen == theirs.seen


def interrupt_after(tokens):
    seen = []

    def streamer(token):
        seen.append(token)
        if len(seen) == tokens:
            raise KeyboardInterrupt

    return streamer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fullkv", "sparsemm"])
def test_the_step_asks_the_same_of_the_device_at_every_length(family, method):
    """No read-back, no shape or allocation that depends on a length or value, a constant number of operators."""
    model = toy_model(family, num_layers=3)
    counts = {}
    with sparsemm.patch(model, settings_of(model, method)) as handle:
        for length in (20, 300):
            inputs = text_inputs(length)
            run = DecodeLoop(handle, streamer=interrupt_after(8))
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, max_new_tokens=20, custom_generate=run)
            assert run.cache.get_seq_length() == length + 7
            counts[length] = [count_operators(run.runner.body) for _ in range(3)]
    every = [count for group in counts.values() for count in group]
    for count in every:
        assert count.offending() == []
        assert count.trace == every[0].trace
        assert count.allocated_bytes == every[0].allocated_bytes
        assert count.launches == every[0].launches > 0
        assert count.names["sparsemm.rope_append.default"] == count.names["sparsemm.varlen_decode.default"] == 3
        largest = max(torch.Size(shape).numel() for _, shapes in count.trace for shape in shapes)
        assert largest < 20 * 64  # nothing of the size of the cached rows: vocabulary 128, MLP 96


def test_the_checks_of_a_step_see_what_they_look_for():
    values = torch.rand(5)
    assert count_operators(lambda: values.sum().item()).offending() == ["aten._local_scalar_dense.default"]
    assert count_operators(lambda: values[values > 0.5]).offending() != []
    assert count_operators(lambda: values.nonzero()).offending() == ["aten.nonzero.default"]
    assert count_operators(lambda: values.view(1, 5)).launches == 0
    count = count_operators(lambda: values.add_(1).mul(2))
    assert count.launches == 2
    assert count.allocated_bytes == values.nbytes


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch):
    """torch leaves the capture's stream current when the capture cannot be ended."""
    streams = ["current"]

    class FailingGraph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            streams[0] = self.stream

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    graphs = graph.CudaGraphs.__new__(graph.CudaGraphs)
    graphs.device, graphs.stream, graphs.pool = "cuda", "capture's", None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "graph", FailingGraph)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: None)
    assert streams == ["current"]


def test_a_step_that_leans_on_the_host_fails_the_emulation():
    graphs = EmulatedGraphs("cpu")
    state, calls = torch.zeros(1), []

    def body():
        calls.append(None)
        state.add_(len(calls))

    replay = graphs.capture(body)
    assert float(state) == 0
    replay()
    replay()
    assert float(state) == 2, "Python ran once, at capture"
    with pytest.raises(AssertionError, match="local_scalar_dense"):
        graphs.capture(lambda: state.fill_(state.item()))


def test_a_step_that_cannot_be_captured_still_runs(caplog):
    model = toy_model("llava-vicuna")
    inputs = toy_inputs(model, 1)

    class Broken(EmulatedGraphs):
        def capture(self, body):
            raise RuntimeError("operation not permitted when stream is capturing")

    with sparsemm.patch(model, config("snapkv", 12)):
        expected = model.generate(**inputs, max_new_tokens=6)
        prompt = sparsemm.generate(model, inputs, max_new_tokens=1)
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        logits = torch.nn.functional.one_hot(prompt.new_tokens[:, 0], 128).float()
        step = DecodeStep(model, prompt.cache, positions, logits)
        tokens = [step.logits.argmax(-1)]

        def body():
            step.token.copy_(step.logits.argmax(-1)[:, None])
            step()

        prompt.cache.grow(10)
        runner = StepRunner(body, prompt.cache, Broken("cpu"))
        for _ in range(5):
            runner()
            tokens.append(step.logits.argmax(-1))
        runner.finish()
    assert runner.captures == 0
    assert "could not be captured" in caplog.text
    assert torch.equal(torch.stack(tokens, 1), expected[:, inputs["input_ids"].shape[1] :])


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a bare parameter is no submodule
def test_layers_on_several_devices_and_offloaded_ones(tmp_path):
    """What `device_map` does to a model: hooks of accelerate that move inputs, and weights, to each layer's device."""
    accelerate = pytest.importorskip("accelerate")
    model = toy_model("llava-mistral", num_layers=3)
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)):
        expected = sparsemm.generate(model, inputs, max_new_tokens=12).sequences
    layers = {f"model.language_model.layers.{index}": "cpu" for index in range(3)}
    layers["model.language_model.layers.1"] = "disk"
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.image_newline": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    assert why_no_graph(model.model.language_model) is not None
    with sparsemm.patch(model, config("snapkv", 12)):
        actual = sparsemm.generate(model, inputs, max_new_tokens=12, prompt_tile=7)
    assert torch.equal(actual.sequences, expected)


# -- long prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_change_nothing_but_rounding(family, monkeypatch):
    monkeypatch.setattr("sparsemm.models.projections.ROTARY_TILE", 8)
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with sparsemm.patch(model, config("adakv", 12)) as handle, torch.no_grad():
        whole = model(**inputs, use_cache=True)
        kept = handle.stats.kept_rows
        with tiled_prompt(handle.text_model, 7):
            tiled = model(**inputs, use_cache=True)
        assert_close(tiled.logits, whole.logits)
        assert torch.equal(handle.stats.kept_rows, kept)
        for ours, theirs in zip(tiled.past_key_values.layers, whole.past_key_values.layers, strict=True):
            assert torch.equal(ours.lens, theirs.lens)
            for row_list in range(len(ours.lens)):  # the same positions, so the same rows
                rows = slice(int(ours.offsets[row_list]), int(ours.offsets[row_list] + ours.lens[row_list]))
                assert_close(ours.key_buffer[rows], theirs.key_buffer[rows])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_exact_where_that_is_asked_for(family, exact):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    stock = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    options = dict(max_new_tokens=1, return_dict_in_generate=False)
    with sparsemm.patch(model, config("fullkv", None)) as handle:
        run = DecodeLoop(handle, prompt_tile=None if exact else 8)
        for _ in range(2):  # the first one proves the operators
            count = count_operators(lambda: model.generate(**inputs, **options, custom_generate=run))
        found = sparsemm.generate(model, inputs, max_new_tokens=2, exact_prompt=exact)
    layers, tiles = len(handle.projections), -(-inputs["input_ids"].shape[1] // 8)
    assert count.names["sparsemm.add_rms_norm.default"] == (0 if exact else 2 * layers + 1)
    assert count.names["sparsemm.silu_mul.default"] == (0 if exact else tiles * layers)
    assert_close(run.step.logits, stock.logits[0])
    assert torch.equal(run.step.logits, stock.logits[0]) or not exact
    assert torch.equal(found.sequences, stock.sequences)


@pytest.mark.parametrize("kind", ["glm4", "olmo2", "qwen3_moe"])
def test_every_norm_and_feed_forward_part_works_in_tiles(kind):
    """Four norms a layer, norms behind attention and MLP only, a mixture of experts."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    kv = dict(num_key_value_heads=1, head_dim=16, pad_token_id=0, num_experts=4, num_experts_per_tok=2)
    text_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **kv)).eval().model
    seen = {}

    def watch(name, module):
        original = module.forward

        def forward(hidden_states):
            seen.setdefault(name, []).append(hidden_states.shape[1])
            return original(hidden_states)

        module.forward = forward

    for name, module in [*text_model.layers[1].named_children(), ("last norm", text_model.norm)]:
        if name != "self_attn":
            watch(name, module)
    ids = torch.arange(2 * 17).view(2, 17)
    with torch.no_grad():
        whole = text_model(ids).last_hidden_state
        expected = {name: [*columns, 7, 7, 3] for name, columns in seen.items()}
        with tiled_prompt(text_model, 7):
            tiled = text_model(ids).last_hidden_state
    assert_close(tiled, whole)
    assert seen == expected and len(seen) == {"glm4": 6, "olmo2": 4, "qwen3_moe": 4}[kind]


def test_rotation_in_tiles_is_exact(monkeypatch):
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)), torch.no_grad():
        whole = model(**inputs, use_cache=True).logits
        monkeypatch.setattr("sparsemm.models.projections.ROTARY_TILE", 5)
        assert torch.equal(model(**inputs, use_cache=True).logits, whole)


def test_no_prompt_wide_mlp_activation_and_no_second_layer_of_keys(monkeypatch):
    """Largest tensors alive and made during a tiled prompt of 600 tokens, by shape."""
    monkeypatch.setattr("sparsemm.models.projections.ROTARY_TILE", 64)
    model = toy_model("llava-vicuna", num_layers=4)
    inputs = text_inputs(600)
    text_model, alive, mlp_rows = model.model.language_model, [], []

    def look(module, args, kwargs):
        gc.collect()
        alive.append(
            sum(
                type(item) is torch.Tensor and item.dim() == 4 and item.shape[-1] == 16 and item.shape[2] == 600
                for item in gc.get_objects()
            )
        )

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in text_model.layers]
    hooks += [
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: mlp_rows.append(out.shape[1]))
        for layer in text_model.layers
    ]
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        run = DecodeLoop(handle, prompt_tile=64)
        model.generate(**inputs, max_new_tokens=1, custom_generate=run)
    for hook in hooks:
        hook.remove()
    assert alive == [0, 0, 0, 0], "full-length keys of an earlier layer are still there"
    assert max(mlp_rows) == 64


@pytest.mark.parametrize("text_config", [LlamaConfig, Qwen3Config])
def test_peak_of_a_long_prompt(text_config, monkeypatch):
    """In Vicuna's proportions: the peak scales to 32K tokens of it, goal weights + 2.5 GB. With q/k norms, too."""
    tokens, size, layers = 2048, 256, 3
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    text = text_config(
        vocab_size=128, hidden_size=size, intermediate_size=688, num_hidden_layers=layers, **heads, eos_token_id=None
    )
    config_ = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, patch_size=7), text_config=text, image_token_index=IMAGE_ID
    )
    model = LlavaNextForConditionalGeneration(config_).eval()
    inputs = text_inputs(tokens)
    unit = tokens * size * 4  # bytes of one tensor [tokens, hidden_size]

    def peak(tile):
        monkeypatch.setattr("sparsemm.models.projections.ROTARY_TILE", tile or tokens)
        with sparsemm.patch(model, sparsemm.CompressionConfig("snapkv", 32)) as handle:
            run = DecodeLoop(handle, prompt_tile=tile)
            made = peak_new_bytes(
                lambda: model.generate(**inputs, max_new_tokens=1, custom_generate=run, pad_token_id=0)
            )
        return made / unit

    tiled, whole = peak(tokens // 16), peak(0)
    stock = peak_new_bytes(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)) / unit
    assert tiled < 8 < 11 < whole < stock
    cache = (256 + 64) * 32 * 32 * 2 * 128 * 2
    assert tiled * 32768 * 4096 * 2 + cache < 2.5e9


# -- with a GPU ----------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not sparsemm.ops.library.is_loaded("cuda"),
    reason="needs a GPU and the CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fullkv", "snapkv", "adakv"])
def test_gpu_replayed_tokens_are_those_of_transformers(family, method):
    model = toy_model(family).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in toy_inputs(model.cpu(), 3).items()}
    model.to("cuda")
    model.generation_config.eos_token_id = ENDS
    with sparsemm.patch(model, settings_of(model, method)):
        expected = model.generate(**inputs, max_new_tokens=90)
        for reserve in (None, 3):
            actual = sparsemm.generate(model, inputs, max_new_tokens=90, reserve=reserve, graph=True)
            assert torch.equal(actual.sequences, expected)


@pytest.mark.gpu
@needs_gpu
def test_gpu_buffers_that_grow_again_and_again_are_recaptured_into_one_pool():
    """Each graph is freed before its buffers move, and the next is captured where it was."""
    model = toy_model("llava-mistral").to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in text_inputs(50, batch=2).items()}
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        expected = model.generate(**inputs, max_new_tokens=220)
        held = []
        for _ in range(4):
            run = DecodeLoop(handle, reserve=1, graph=True)
            actual = model.generate(**inputs, max_new_tokens=220, custom_generate=run)
            assert torch.equal(actual, expected)
            assert run.runner.captures >= 3
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
        assert held[-1] == held[1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gpu_rows_that_the_kernels_refuse(dtype):
    model, cpu = toy_model("qwen2-vl", dtype=dtype).to("cuda"), toy_model("qwen2-vl", dtype=dtype)
    inputs = text_inputs(50, batch=2)
    expected = sparsemm.generate(cpu, inputs, config("adakv", 12), max_new_tokens=20)
    actual = sparsemm.generate(model, inputs, config("adakv", 12), max_new_tokens=20)
    assert torch.equal(actual.sequences.cpu(), expected.sequences)
    assert actual.graph == (dtype == torch.float32)


@pytest.mark.gpu
@needs_gpu
def test_gpu_step_never_waits():
    model = toy_model("qwen2-vl").to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in text_inputs(50).items()}
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        run = DecodeLoop(handle, graph=True)
        model.generate(**inputs, max_new_tokens=12, custom_generate=run)
        run.cache.grow(10)
        runner = StepRunner(run.step, run.cache, loop.CudaGraphs(torch.device("cuda")))
        runner()
        runner()
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner()
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert runner.captures == 1

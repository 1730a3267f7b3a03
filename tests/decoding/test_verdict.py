"""A language model that does more than its layers keeps its own forward in every decode step."""

from __future__ import annotations

import functools

import pytest
import torch
from graph_emulation import EmulatedGraphs
from greedy_runs import config, text_inputs
from toy_models import FAMILIES, toy_inputs, toy_model

import sparsemm
from sparsemm.decoding import DecodeLoop, DecodeStep, loop


def wrap(module, change):
    """`module.forward` as an instance attribute, with its output changed."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return change(original(*args, **kwargs))

    module.forward = forward


def shift_logits(output):
    output.logits = output.logits.roll(1, dims=-1)
    return output


def scale_states(output):
    output.last_hidden_state = output.last_hidden_state.flip(-1)
    return output


def multiply_embeddings(model):
    """As Gemma and Granite do, inside the text model's forward."""
    text_model = model.model.language_model
    original = text_model.forward

    @functools.wraps(original)
    def forward(*args, inputs_embeds=None, **kwargs):
        return original(*args, inputs_embeds=inputs_embeds * 5, **kwargs)

    text_model.forward = forward


CHANGES = {
    "logits": lambda model: wrap(model, shift_logits),
    "states": lambda model: wrap(model.model, scale_states),
    "embeddings": multiply_embeddings,
}


@pytest.fixture
def forwards(monkeypatch):
    """Decode steps by the model's own forward, counted."""
    calls, original = [], DecodeStep.forward_of_model
    monkeypatch.setattr(DecodeStep, "forward_of_model", lambda self: calls.append(None) or original(self))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("captured", [False, True])
def test_tokens_are_those_of_the_models_own_forward(family, change, captured, monkeypatch, caplog):
    if captured:
        monkeypatch.setattr(loop, "CudaGraphs", EmulatedGraphs)
        monkeypatch.setattr(loop, "why_no_graph", lambda *args: None)
    model = toy_model(family)
    CHANGES[change](model)
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)):
        expected = model.generate(**inputs, max_new_tokens=20)
        actual = sparsemm.generate(model, inputs, max_new_tokens=20, reserve=3)
    assert torch.equal(actual.sequences, expected)
    assert actual.cache.get_seq_length() == expected.shape[1] - 1
    assert not actual.graph
    assert "every decode step runs its own forward" in caplog.text


def test_the_verdict_is_remembered_until_something_changes(forwards):
    model = toy_model("llava-mistral")
    inputs = toy_inputs(model, 1)

    def asked(settings=None):
        del forwards[:]
        sparsemm.generate(model, inputs, settings or config("snapkv", 12), max_new_tokens=5)
        return len(forwards)

    assert asked() == 1
    assert asked() == asked(config("adakv", 14)) == 0, "another patch is no change"
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert asked() == 1 and asked() == 0
    original = model.forward
    wrap(model, shift_logits)
    assert asked() == 2 + 4 and asked() == 4, "asked, measured in more precision, and four steps"
    model.forward = original
    assert asked() == 1 and asked() == 0
    hook = model.model.language_model.norm.register_forward_hook(lambda module, args, output: output * 1.5)
    assert asked() == 1 and asked() == 0
    hook.remove()
    model.model.language_model.layers[0].mlp = torch.nn.Identity()
    assert asked() == 1 and asked() == 0


def test_one_token_asks_nothing(forwards):
    model = toy_model("llava-mistral")
    sparsemm.generate(model, text_inputs(20), config("snapkv", 12), max_new_tokens=1)
    assert not forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_leaves_no_trace(family):
    """Nor is it seen by an observer."""
    model, other = toy_model(family), toy_model(family)
    inputs = toy_inputs(model, 2)
    seen = {}
    for name, each in (("asked", model), ("known", other)):
        if name == "known":
            sparsemm.generate(each, inputs, config("snapkv", 12), max_new_tokens=3)
        with sparsemm.patch(each, config("snapkv", 12)) as handle:
            seen[name] = []
            handle.observer = lambda layer_idx, query, layer, name=name: seen[name].append(layer.lens.tolist())
            run = DecodeLoop(handle)
            each.generate(**inputs, max_new_tokens=6, custom_generate=run)
            seen[name].append([layer.lens.tolist() for layer in run.cache.layers])
            seen[name].append((run.cache.memory_bytes(), handle.stats.full_cache_bytes, run.cache.room))
    assert seen["asked"] == seen["known"]


@pytest.mark.parametrize(("dtype", "finer"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize(("noise", "serves"), [(0.5, True), (20.0, False)])
def test_rounding_is_told_from_another_function(noise, serves, dtype, finer, forwards, monkeypatch):
    """Layers whose logits are off by half, or by twenty times, the error that the model itself has in its dtype."""
    model, exact = toy_model("llava-vicuna", dtype=dtype), toy_model("llava-vicuna").to(finer)
    exact.load_state_dict(model.state_dict())
    inputs = text_inputs(30)
    with torch.no_grad():
        error = float((model(**inputs).logits[:, -1].to(finer) - exact(**inputs).logits[:, -1]).abs().max())
    assert error > 0
    original = DecodeStep.forward_of_layers

    def off(self):
        logits = original(self).to(finer)
        logits[:, 3] += noise * error
        return logits

    monkeypatch.setattr(DecodeStep, "forward_of_layers", off)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsemm.generate(model, inputs, config("fullkv", None), max_new_tokens=5)
    assert len(forwards) == 2 + (0 if serves else 4)  # the comparison, and the error in float32
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_that_cannot_be_measured_is_taken_as_none(forwards, monkeypatch, caplog):
    model = toy_model("llava-vicuna", dtype=torch.bfloat16)
    original = DecodeStep.forward_of_layers
    monkeypatch.setattr(DecodeStep, "forward_of_layers", lambda self: original(self) + 0.01)

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("sparsemm.decoding.verdict._finer_logits", no_memory)
    out = sparsemm.generate(model, text_inputs(30), config("fullkv", None), max_new_tokens=5)
    assert len(forwards) == 1 + 4
    assert "could not be measured: no memory" in caplog.text and out.new_tokens.shape == (1, 5)


@pytest.mark.parametrize(("share", "serves"), [(1.9, True), (2.1, False)])
def test_twice_the_models_own_error_is_the_limit(share, serves, forwards, monkeypatch):
    own = []
    original = DecodeStep.forward_of_model
    monkeypatch.setattr(DecodeStep, "forward_of_model", lambda self: own.append(original(self)) or own[-1])
    monkeypatch.setattr("sparsemm.decoding.verdict._finer_logits", lambda step: own[-1] + 0.25)
    monkeypatch.setattr(DecodeStep, "forward_of_layers", lambda self: original(self) + 0.25 * share)
    sparsemm.generate(toy_model("llava-vicuna"), text_inputs(30), config("fullkv", None), max_new_tokens=5)
    assert len(own) == 1 + (0 if serves else 4)

"""Decoder layers in a dozen kernels: recognised, proved, and otherwise left alone."""

from __future__ import annotations

import logging

import pytest
import torch
from greedy_runs import config, scores, text_inputs
from toy_models import toy_inputs, toy_model
from toy_vlms import LANGUAGE_MODELS, TOYS, toy_vlm

import sparsemm
from sparsemm.bench.steps import kernel_counts, step_kernels
from sparsemm.decoding import DecodeLoop
from sparsemm.decoding.fused_layer import NotRecognisedError, nearly_equal, norm_rule

MORE_THAN_LAYERS = ("granite", "gemma3", "cohere2")  # embeddings or logits that are scaled, sliding windows
OTHERWISE_BUILT = {
    "glm4v": "post_mlp_layernorm",
    "gemma3_text, none sliding": "pre_feedforward_layernorm",
    "qwen3_vl_moe": "one of its projections is missing",
}


def run_of(model, inputs=None, settings=None, tokens=10):
    """Tokens of transformers' own loop and of ours under one patch, and the loop."""
    inputs = text_inputs(30) if inputs is None else inputs
    with sparsemm.patch(model, settings or config("snapkv", 12)) as handle, torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        run = DecodeLoop(handle)
        found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, custom_generate=run)
    return expected, found, run


def fused_layers(run):
    return [fused is not None for _, fused in run.step.layers]


def toy(name, dtype=torch.float32):
    model = toy_vlm(name)[0].to(dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*TOYS, *LANGUAGE_MODELS])
def test_tokens_of_every_family_are_those_of_its_own_layers(name, dtype, caplog):
    caplog.set_level(logging.INFO)
    expected, found, run = run_of(toy(name, dtype))
    assert torch.equal(found, expected)
    if run.step.by_model:
        assert name.startswith(MORE_THAN_LAYERS)
    elif name in OTHERWISE_BUILT:
        assert not any(fused_layers(run)) and OTHERWISE_BUILT[name] in caplog.text
    else:
        assert all(fused_layers(run)) and run.step.norm is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
def test_kernels_inside_a_layer_and_outside(family, dtype):
    """Of a step, views and allocations aside; counted at two depths."""
    counts = step_kernels(lambda num_layers: toy_model(family, num_layers=num_layers, dtype=dtype))
    assert counts["inside"] <= 13 and counts["outside"] <= 10


def test_kernels_of_language_models():
    """With biases, and with norms of queries and keys, among them."""
    for name, counts in kernel_counts().items():
        assert counts["inside"] <= (10 if "merged" in name else 13) and counts["outside"] <= 10


class Wrapped(torch.nn.Module):
    """As adapters wrap a projection."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1.25


def wrap_projection(layer):
    layer.mlp.up_proj = Wrapped(layer.mlp.up_proj)


def hook_projection(layer):
    layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output * 1.25)


def override_mlp(layer):
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: original(x) * 1.25


def other_norm(layer):
    class Centred(type(layer.input_layernorm)):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    layer.input_layernorm.__class__ = Centred


def other_residual(layer):
    class Damped(type(layer)):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states + 0.99 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)

    layer.__class__ = Damped


def other_activation(layer):
    layer.mlp.act_fn = torch.nn.ReLU()


def second_activation(layer):
    class Limited(type(layer.mlp)):
        def forward(self, x):
            return self.limit(super().forward(x))

    layer.mlp.__class__ = Limited
    layer.mlp.limit = torch.nn.Hardtanh(-0.01, 0.01)


def no_activation(layer):
    layer.mlp.act_fn = torch.nn.Identity()


def activation_with_weights(layer):
    """A SiLU as it stands, and another function as soon as it is trained."""

    class Swish(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(self.weight * x)

    layer.mlp.act_fn = Swish()
    layer.mlp.act_fn.weight = torch.nn.Parameter(torch.ones((), dtype=layer.mlp.gate_proj.weight.dtype))


CHANGES = [
    wrap_projection, hook_projection, override_mlp, other_norm, other_residual, other_activation, second_activation,
    no_activation, activation_with_weights,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_does_something_else_runs_as_it_is(change, dtype, caplog):
    caplog.set_level(logging.INFO, "sparsemm.decoding")
    model = toy("llama", dtype)
    run_of(model)
    change(model.model.layers[1])
    expected, found, run = run_of(model)
    assert torch.equal(found, expected)
    assert fused_layers(run) == [True, False]
    said = [record for record in caplog.records if "take their own forward" in record.getMessage()]
    assert len(said) == 1 and said[0].getMessage().startswith("1 of 2 decoder layers")
    run_of(model)
    assert len([each for each in caplog.records if "take their own forward" in each.getMessage()]) == 1, "said once"


def test_gelu_and_offset_weights():
    """Norms and MLPs as Gemma has them, under another model's embeddings."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    model = toy("llama", torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU(approximate="tanh")
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = GemmaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
            torch.nn.init.normal_(norm.weight, std=0.3)
            setattr(layer, name, norm)
    expected, found, run = run_of(model)
    assert torch.equal(found, expected) and all(fused_layers(run))
    assert all(fused.before_attention.unit_offset for _, fused in run.step.layers)


@pytest.mark.parametrize("method", ["mask", "fullkv"])
def test_masked_heads_and_observers_need_the_layers_own_attention(method):
    model = toy_model("llava-mistral")
    table = scores(model) if method == "mask" else None
    settings = config(method, None, head_scores=table, **({"mask_ratio": 0.3} if table else {}))
    run_of(model, toy_inputs(model, 1))  # what is known of the model does not know of the mask
    if method == "mask":
        expected, found, run = run_of(model, toy_inputs(model, 1), settings)
        assert torch.equal(found, expected) and not any(fused_layers(run))
    seen = []
    with sparsemm.patch(model, settings) as handle:
        handle.observer = lambda layer_idx, query, layer: seen.append(layer_idx)
        model.generate(**toy_inputs(model, 1), max_new_tokens=3, custom_generate=DecodeLoop(handle))
    assert seen == [0, 1] * 3


def test_a_norm_must_be_what_it_reads_as():
    with pytest.raises(NotRecognisedError, match="no RMS norm"):
        norm_rule(torch.nn.LayerNorm(16))
    rule = norm_rule(torch.nn.RMSNorm(16, eps=1e-6))
    assert (rule.eps, rule.unit_offset) == (1e-6, False)


def test_nearly_equal_tells_rounding_from_another_value():
    for dtype in (torch.float32, torch.bfloat16):
        exact = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
        rounded_once_more = (exact.double() * (1 + torch.finfo(dtype).eps / 8)).to(dtype)
        assert nearly_equal(rounded_once_more, exact)
        assert not nearly_equal((exact.double() * 1.02).to(dtype), exact)
        assert not nearly_equal(exact.double(), exact)


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, 64), (torch.bfloat16, 0.5)])
def test_how_nearly_is_nearly_equal(dtype, places):
    """In units of the last place, over the norm: of ones, some are off by whole units."""
    eps, exact, off = torch.finfo(dtype).eps, torch.ones(400, dtype=dtype), torch.ones(400, dtype=dtype)
    off[: 400 if places >= 1 else 100] += max(places, 1) * eps
    assert nearly_equal(off, exact)
    off[-1] += 2 * eps
    assert not nearly_equal(off, exact)


def storages(model):
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_merged_projections_are_views_and_come_apart_again(name, dtype):
    model, inputs = toy(name, dtype), text_inputs(30)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before, parameters = storages(model), dict(model.named_parameters())
    expected, _, _ = run_of(model)
    with sparsemm.patch(model, config("snapkv", 12), merge_projections=True) as handle:
        during = storages(model)
        assert sum(during.values()) == sum(before.values()), "no second copy"
        assert (len(during) < len(before)) == (name != "phi3"), "which has one projection of each from the start"
        run = DecodeLoop(handle)
        found = model.generate(**inputs, max_new_tokens=10, do_sample=False, custom_generate=run)
        assert all(len(fused.projections) == len(fused.gates) == 1 for _, fused in run.step.layers)
        assert torch.equal(found, expected)
    assert sorted(storages(model).values()) == sorted(before.values())
    assert all(parameters[key] is each for key, each in model.named_parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("change", [wrap_projection, hook_projection])
def test_projections_with_something_about_them_are_not_merged(change):
    model = toy("llama")
    change(model.model.layers[0])
    before = storages(model)
    with sparsemm.patch(model, config("snapkv", 12), merge_projections=True):
        assert len(storages(model)) == len(before) - 2 - 1 - (2 if change is wrap_projection else 1)


def test_what_a_hook_keeps_of_a_step_can_be_changed():
    """Only steps of nothing but fused layers run without autograd's bookkeeping."""
    model, kept = toy("llama"), []
    _, _, run = run_of(model)
    assert run.step.mode is torch.inference_mode
    model.model.layers[1].register_forward_hook(lambda module, args, output: kept.append(output))
    _, _, run = run_of(model)
    assert run.step.mode is torch.no_grad and not kept[-1].is_inference()
    kept[-1].mul_(2)

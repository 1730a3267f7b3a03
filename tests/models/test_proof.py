"""Attention modules as they read against their own forward: what is served, what is refused, what is left alone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsemm.errors import UnsupportedModelError
from sparsemm.models import projections, proof
from sparsemm.models.proof import proved_projections
from sparsemm.models.rotation import with_rotation

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ALL_FULL = {"layer_types": ["full_attention"] * 2}
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4,
    moe_intermediate_size=16, first_k_dense_replace=2, num_key_value_heads=4,
)  # fmt: skip
GEMMA3N = dict(
    intermediate_size=[32] * 2, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=8,
    activation_sparsity_pattern=[0.0] * 2, num_kv_shared_layers=1,
)  # fmt: skip
YARN_FREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def language_model(kind: str, **settings: Any) -> nn.Module:
    """The decoder stack of a random toy, weights and norms far from their initial values."""
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.model


SERVED = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3},
    "gemma": {},
    "glm4": {},
    "apertus": YARN_FREE,
    "phi3": {"sliding_window": None, **YARN_FREE},
    "smollm3": {"num_hidden_layers": 4},
    "cohere2": {"sliding_window": None, **ALL_FULL},
    "gemma3_text": {"query_pre_attn_scalar": 16, **ALL_FULL},
}


@pytest.mark.parametrize("kind", SERVED)
def test_what_is_served(kind: str) -> None:
    text_model = language_model(kind, **SERVED[kind])
    found = proved_projections(text_model)
    assert len(found) == len(text_model.layers)
    norms = dict.fromkeys(("qwen3", "qwen3_moe", "apertus", "gemma3_text"), "head") | {"olmo2": "width"}
    norms = norms.get(kind)
    assert {each.norms for each in found} == {norms}
    assert {each.scaling for each in found} == {0.3 if kind == "granite" else 0.25}
    assert (found[0].fused == (64, 32, 32)) == (kind == "phi3")
    rotated = {"smollm3": [True, True, True, False], "cohere2": [False, False]}.get(kind, [True] * len(found))
    assert [each.rotary is not None for each in found] == rotated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, interleaved", [("qwen3", False), ("glm4", True), ("cohere", None), ("cohere2", None)])
def test_the_operator_of_a_rotation_is_known_by_its_results(
    kind: str, interleaved: bool | None, dtype: torch.dtype
) -> None:
    found = proved_projections(language_model(kind, **SERVED.get(kind, {})).to(dtype))
    assert {each.interleaved for each in found} == {interleaved}


@pytest.mark.parametrize("changed", [0, 7, 15])
def test_a_rotation_that_differs_in_one_dimension_has_no_operator(changed: int) -> None:
    (found, _), generator = proved_projections(language_model("llama")), torch.Generator().manual_seed(0)

    def rotary(query: torch.Tensor, key: torch.Tensor, *factors: torch.Tensor) -> Any:
        query, key = found.rotary(query, key, *factors)
        key[..., changed] *= 1.001
        return query, key

    query, key = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
    factors = torch.ones(1, 3, 16), torch.zeros(1, 3, 16)
    for one, interleaved in ((found.rotary, False), (rotary, None)):
        read = dataclasses.replace(found, rotary=one, interleaved=None)
        assert with_rotation(read, factors, {"query": query, "key": key}).interleaved is interleaved


REFUSED = {
    "soft cap": ("gemma2", ALL_FULL, "caps its attention logits at 50"),
    "sinks": ("gpt_oss", {**ALL_FULL, **YARN_FREE, "num_local_experts": 2}, "attention sinks"),
    "sliding window": ("mistral", {"sliding_window": 8}, "sliding window of 8 tokens"),
    "soft cap beside sliding layers": ("gemma2", {}, "layer 1 .*caps its attention logits"),
    "only sliding layers": ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "layer 0 .*window of 4096"),
    "chunks": ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 32}, "chunked attention"),
    "latent, V2": ("deepseek_v2", LATENT, "latent attention"),
    "latent, V3": ("deepseek_v3", {**LATENT, "n_group": 1, "topk_group": 1}, "latent attention"),
    "shared KV": ("gemma3n_text", {**GEMMA3N, **ALL_FULL}, "layer 1 .*shared KV"),
    "linear": ("qwen3_next", {"num_experts": 2, "moe_intermediate_size": 16}, "linear attention"),
    "an output gate": ("qwen3_next", {"num_experts": 2, "moe_intermediate_size": 16, **ALL_FULL}, "its query is"),
    "norm before o_proj": ("bitnet", {}, "its output is not what o_proj would give"),
    "norms after the rotation": ("nanochat", {}, "its query is not what"),
    "queries scaled by position": ("ministral3", {"sliding_window": None}, "its query is not what"),
    "a mask of its own": ("doge", {}, "not attend by the mask it is given"),
    "other names": ("phi", {}, "its parts are dense, k_proj"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why: str) -> None:
    kind, settings, message = REFUSED[why]
    with pytest.raises(UnsupportedModelError, match=message):
        proved_projections(language_model(kind, **settings))


def _beside_sliding_layers(**settings: Any) -> nn.Module:
    return language_model("gemma3_text", layer_types=["sliding_attention", "full_attention"], **settings)


def test_sliding_layers_stay_as_they_are() -> None:
    text_model = _beside_sliding_layers(sliding_window=8, query_pre_attn_scalar=4)
    sliding, full = proved_projections(text_model)
    assert sliding is None and full.scaling == 0.5 and full.norms == "head" and full.rotary is not None


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_layer_is_rotated_as_its_kind_is(layer_idx: int) -> None:
    """The positions of the other kind's rotation would be noticed, in the layers that are served."""
    text_model = _beside_sliding_layers()
    attention = text_model.layers[layer_idx].self_attn
    original = attention.forward

    def forward(**kwargs: Any) -> Any:
        cos, sin = text_model.rotary_emb(kwargs["hidden_states"], torch.tensor([[3, 1, 7, 12]]), "sliding_attention")
        return original(**{**kwargs, "position_embeddings": (cos, sin)})

    attention.forward = forward
    if layer_idx == 0:
        assert proved_projections(text_model)[0] is None
    else:
        with pytest.raises(UnsupportedModelError, match="layer 1 .*its query is not what"):
            proved_projections(text_model)


def test_a_sliding_layer_that_keeps_no_keys_is_refused() -> None:
    text_model = _beside_sliding_layers()
    attention = text_model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda **kwargs: original(**{**kwargs, "past_key_values": None})
    with pytest.raises(UnsupportedModelError, match="layer 0 .*into its cache, once"):
        proved_projections(text_model)


def test_attention_in_both_directions_is_refused() -> None:
    text_model = language_model("llama")
    text_model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="layer 1 .*both directions"):
        proved_projections(text_model)


class _Spoilt(nn.Module):
    """A projection whose last feature is off by one unit in the last place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = self.inner(hidden_states).clone()
        out[..., -1] = torch.nextafter(out[..., -1], torch.tensor(torch.inf))
        return out


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_one_unit_in_the_last_place_is_a_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own forward sees the spoilt projection, ours the sound one."""
    text_model = language_model("llama")
    attention = text_model.layers[1].self_attn
    part = "o_proj" if name == "output" else f"{name[0]}_proj"
    sound, spoilt = getattr(attention, part), _Spoilt(getattr(attention, part))
    original = attention.forward

    def forward(**kwargs: Any) -> Any:
        setattr(attention, part, spoilt)
        try:
            return original(**kwargs)
        finally:
            setattr(attention, part, sound)

    attention.forward = forward
    with pytest.raises(UnsupportedModelError, match=f"layer 1 .*its {name} is not what"):
        proved_projections(text_model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda kwargs: kwargs | {"past_key_values": None}, "into its cache, once"),
        (lambda kwargs: kwargs | {"softcap": 20.0}, "soft cap"),
        (
            lambda kwargs: kwargs | {"attention_mask": kwargs["attention_mask"] - 1},
            "not attend by the mask it is given",
        ),
        (lambda kwargs: kwargs | {"attention_mask": None}, "not attend by the mask it is given"),
        (lambda kwargs: kwargs | {"is_causal": False}, "both directions"),
        (lambda kwargs: kwargs | {"temperature": 2.0}, "hands temperature to its attention"),
        (lambda kwargs: kwargs | {"hidden_states": kwargs["hidden_states"][..., :5]}, "does not run as decoder layers"),
    ],
)
def test_what_a_forward_hands_on_is_seen(change: Any, message: str) -> None:
    text_model = language_model("qwen2")
    attention = text_model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda **kwargs: original(**change(kwargs))
    with pytest.raises(UnsupportedModelError, match=message):
        proved_projections(text_model)
    del attention.forward
    assert len(proved_projections(text_model)) == 2


def test_weights_that_are_not_numbers_are_no_difference() -> None:
    """What a broken checkpoint says is the stock model's business."""
    text_model = language_model("qwen2")
    with torch.no_grad():
        text_model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    assert len(proved_projections(text_model)) == 2


def test_nothing_is_disturbed() -> None:
    text_model = language_model("qwen3", attention_dropout=0.5)
    text_model.train()
    text_model.layers[1].self_attn.q_proj.eval()
    calls: list[nn.Module] = []
    for module in (text_model, *text_model.layers, *(layer.self_attn for layer in text_model.layers)):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    state = torch.get_rng_state()
    modes = [module.training for module in text_model.modules()]
    settings = copy.deepcopy(text_model.config.to_dict())
    before = [dict(vars(layer.self_attn)) for layer in text_model.layers]
    interface = dict(projections.Projections.of(text_model.layers[0].self_attn).interface)
    proved_projections(text_model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in text_model.modules()] == modes
    assert text_model.config.to_dict() == settings and text_model.config._attn_implementation == "sdpa"
    assert [vars(layer.self_attn) for layer in text_model.layers] == before
    assert dict(projections.Projections.of(text_model.layers[0].self_attn).interface) == interface
    assert calls == [] and all(parameter.grad is None for parameter in text_model.parameters())


def test_a_module_that_names_no_scaling_has_the_default_one() -> None:
    text_model = language_model("llama")
    for layer in text_model.layers:
        layer.self_attn.scaling = None
    assert {each.scaling for each in proved_projections(text_model)} == {0.25}


def test_a_model_in_training_is_proved_without_its_dropout() -> None:
    text_model = language_model("llama").train()
    for layer in text_model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, _, out: nn.functional.dropout(out, 0.5, module.training)
        )
    assert len(proved_projections(text_model)) == 2


@pytest.mark.parametrize("kind", ["llama", "glm4", "cohere2", "smollm3"])
def test_the_matrix_of_a_rotation_does_as_the_modules_own(kind: str) -> None:
    """Of several sequences, each at its place; rotated by halves, by neighbours and in part, and not at all."""
    text_model = language_model(kind, **SERVED[kind])
    rows = torch.randn(3, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    factors = text_model.rotary_emb(rows, torch.tensor([[5], [0], [40]]))
    for layer, found in zip(text_model.layers, proved_projections(text_model), strict=True):
        rotated = rows
        if found.rotary is not None:
            rotated, _ = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb(rows, rows, *factors)
            assert (rotated - rows).abs().max() > 0.5
        matrix = found.matrix(factors, like=rows)
        assert matrix.shape[1:] == (16, 16)
        torch.testing.assert_close(rows[:, 0] @ matrix.mT, rotated[:, 0], rtol=1e-5, atol=1e-5)


def test_weights_kept_elsewhere_are_fetched_by_their_hooks(tmp_path: Path) -> None:
    text_model = language_model("smollm3", num_hidden_layers=4)
    expected = proved_projections(text_model)
    places = {name: "cpu" for name, _ in text_model.named_children() if name != "layers"}
    places |= {f"layers.{layer_idx}": "disk" if layer_idx > 1 else "cpu" for layer_idx in range(4)}
    accelerate.dispatch_model(text_model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    attention = text_model.layers[3].self_attn
    assert attention.q_proj.weight.is_meta
    assert proved_projections(text_model) == expected
    assert attention.q_proj.weight.is_meta
    attention.use_rope = True
    assert proved_projections(text_model)[3].rotary is not None


def test_weights_on_the_meta_device_are_taken_as_they_read() -> None:
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SMALL)).model
    assert [each.norms for each in proved_projections(text_model)] == ["head", "head"]
    text_model.config.sliding_window, text_model.config.layer_types = 8, ["sliding_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="sliding window of 8"):
        proved_projections(text_model)


def test_the_verdict_is_remembered_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    text_model = language_model("qwen3")
    proofs = []
    prove = proof._prove
    monkeypatch.setattr(proof, "_prove", lambda *args: proofs.append(1) or prove(*args))

    def proved_again() -> bool:
        before = len(proofs)
        proved_projections(text_model)
        return len(proofs) > before

    attention = text_model.layers[1].self_attn
    assert proved_again() and not proved_again()
    text_model.train()
    assert not proved_again()
    with torch.no_grad():
        attention.k_norm.weight.mul_(2)
    assert proved_again() and not proved_again()
    attention.q_proj = copy.deepcopy(attention.q_proj)
    assert proved_again() and not proved_again()
    attention.scaling = 0.5
    assert proved_again() and not proved_again()
    original = attention.forward
    attention.forward = lambda **kwargs: original(**kwargs)
    assert proved_again() and not proved_again()
    del attention.forward
    assert proved_again() and not proved_again()
    monkeypatch.setattr(type(attention.k_norm), "forward", lambda self, states: states)
    assert proved_again() and not proved_again()


def test_a_remembered_model_can_be_freed() -> None:
    text_model = language_model("qwen3")
    proved_projections(text_model)
    gone = weakref.ref(text_model)
    del text_model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "phi3", "gemma"])
def test_long_prompts_are_normalised_and_rotated_in_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text_model = language_model(kind, **SERVED[kind])
    module, (found, _) = text_model.layers[0].self_attn, proved_projections(text_model)
    hidden_states = torch.randn(2, 23, 64, generator=torch.Generator().manual_seed(0))
    embeddings = text_model.rotary_emb(hidden_states, torch.arange(23)[None])
    tiles = []

    def rotary(query: torch.Tensor, *others: torch.Tensor) -> Any:
        tiles.append(query.shape[2])
        return found.rotary(query, *others)

    with torch.no_grad():
        whole = found.project(module, hidden_states, embeddings)
        monkeypatch.setattr(projections, "ROTARY_TILE", 5)
        tiled = dataclasses.replace(found, rotary=rotary).project(module, hidden_states, embeddings)
    assert tiles == [5, 5, 5, 5, 3]
    assert all(torch.equal(one, other) for one, other in zip(whole, tiled, strict=True))
    assert all(each.is_contiguous() for each in tiled[1:])  # a head's rows side by side, as attention reads them

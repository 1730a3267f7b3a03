"""What the patch accepts, refuses and leaves alone; masking of heads against edited weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from greedy_runs import assert_close, config, greedy, scores, text_inputs, without_heads
from PIL import Image
from toy_models import FAMILIES, toy_inputs, toy_model
from toy_vlms import toy_vlm
from transformers import QuantizedCache, StaticCache

import sparsemm
from sparsemm.bench.operators import count_operators
from sparsemm.errors import CacheError, ConfigError, HeadScoreError, PatchError, UnsupportedModelError
from sparsemm.models import family_of


def test_use_cache_false_is_the_unpatched_model():
    model = toy_model("qwen2-vl")
    inputs = toy_inputs(model, 2)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False)
        with sparsemm.patch(model, config()):
            actual = model(**inputs, use_cache=False)
    assert torch.equal(actual.logits, expected.logits)
    assert actual.past_key_values is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["zero_query", "zero_output"])
def test_masked_heads_equal_a_model_with_edited_weights(family, mode):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    table = scores(model)
    settings = config("mask", None, head_scores=table, mask_ratio=0.4, mask_mode=mode)
    edited = without_heads(model, table, 0.4, mode)
    _, expected, _ = greedy(edited, inputs)
    _, unmasked, _ = greedy(model, inputs)
    with sparsemm.patch(model, settings) as handle:
        _, logits, _ = greedy(model, inputs)
        assert handle.stats.effective_budget == pytest.approx(inputs["attention_mask"].sum(1).float().mean().item())
        without_cache = model(**inputs, use_cache=False).logits
    assert_close(logits, expected)
    assert_close(without_cache, edited(**inputs, use_cache=False).logits)
    assert not torch.allclose(expected[0], unmasked[0], atol=1e-4)


def test_two_models_and_two_methods_in_one_process():
    first, second = toy_model("llava-vicuna"), toy_model("qwen2-vl")
    inputs_first, inputs_second = toy_inputs(first, 1), toy_inputs(second, 1)

    def run(model, inputs, settings):
        with sparsemm.patch(model, settings) as handle:
            return greedy(model, inputs)[1], handle.stats.kept_rows

    alone = [run(first, inputs_first, config("snapkv", 10)), run(second, inputs_second, config("adakv", 12))]
    with sparsemm.patch(first, config("snapkv", 10)), sparsemm.patch(second, config("adakv", 12)):
        together = [greedy(first, inputs_first)[1], greedy(second, inputs_second)[1]]
    for (expected, _), actual in zip(alone, together, strict=True):
        assert torch.equal(actual, expected)
    run(first, inputs_first, config("adakv", 12))
    assert torch.equal(run(first, inputs_first, config("snapkv", 10))[0], alone[0][0])


def test_pyramid_budgets_follow_each_prompt():
    model = toy_model("llava-vicuna", num_layers=3)
    with sparsemm.patch(model, config("pyramidkv", 12)) as handle:
        for length in (60, 15, 200):
            greedy(model, text_inputs(length), tokens=1)
            expected = sparsemm.head_budgets(
                handle.config, num_layers=3, num_query_heads=4, num_kv_heads=4, prompt_length=length
            )
            assert torch.equal(handle.stats.kept_rows[0], expected)


def test_nested_patches_are_refused_and_the_first_survives():
    model = toy_model("llava-vicuna")
    with sparsemm.patch(model, config()) as handle:
        with pytest.raises(PatchError, match="patched already"):
            sparsemm.patch(model, config("adakv"))
        greedy(model, toy_inputs(model, 1), tokens=1)
        assert handle.stats.method == "snapkv"
    sparsemm.patch(model, config("adakv")).remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_hooks_keep_working_and_stay(family):
    model = toy_model(family)
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module.layer_idx)
            return args, kwargs

    for layer in model.model.language_model.layers:
        add_hook_to_module(layer.self_attn, Counting())
    before = [vars(layer.self_attn)["forward"] for layer in model.model.language_model.layers]
    inputs = toy_inputs(model, 1)
    expected = greedy(model, inputs, tokens=2)[1]
    calls.clear()
    with sparsemm.patch(model, config(budget=10)):
        squeezed = greedy(model, inputs, tokens=2)[1]
    assert calls == [0, 1] * 2
    assert not torch.equal(squeezed, expected)
    assert [vars(layer.self_attn)["forward"] for layer in model.model.language_model.layers] == before
    assert torch.equal(greedy(model, inputs, tokens=2)[1], expected)
    for layer in model.model.language_model.layers:
        remove_hook_from_module(layer.self_attn)


def test_a_forward_set_on_the_instance_is_put_back():
    model = toy_model("llava-mistral")
    attention = model.model.language_model.layers[0].self_attn
    original = attention.forward

    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)

    attention.forward = wrapper
    with sparsemm.patch(model, config(budget=10)) as handle:
        greedy(model, toy_inputs(model, 1), tokens=2)
        assert handle.stats.effective_budget == 10
    assert vars(attention)["forward"] is wrapper


def test_other_caches_are_refused():
    model = toy_model("llava-vicuna")
    inputs = text_inputs(20)
    with torch.no_grad():
        filled = model(**inputs, use_cache=True).past_key_values
        barely = model(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values
    with sparsemm.patch(model, config(budget=10)) as handle:
        with pytest.raises(CacheError, match="StaticCache"):
            model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(CacheError, match="StaticCache"):
            model(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=30))
        for cache in (filled, barely):
            with pytest.raises(CacheError, match="before the model was patched"):
                model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(ConfigError, match="assisted decoding"):
            model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=4)
        with pytest.raises(CacheError, match="2-D"):
            model(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 1, 20, 20), use_cache=True)
        with torch.no_grad():
            ours = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(CacheError, match="attention_mask has shape"):
            model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 5), past_key_values=ours)
        with pytest.raises(CacheError, match="1 sequences"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=ours)
        del handle
    with pytest.raises(CacheError, match="not .*patched"):
        model(input_ids=torch.tensor([[5]]), past_key_values=ours)


def test_quantized_cache_is_refused_by_type():
    cache = QuantizedCache.__new__(QuantizedCache)  # its constructor wants a quantization backend
    model = toy_model("llava-vicuna")
    with sparsemm.patch(model, config()), pytest.raises(CacheError, match="QuantizedCache"):
        model(**text_inputs(20), past_key_values=cache)


def test_sliding_windows_are_refused():
    model = toy_model("llava-mistral")
    model.config.text_config.sliding_window = 4096
    with pytest.raises(UnsupportedModelError, match="sliding window of 4096"):
        sparsemm.patch(model, config())
    qwen = toy_model("qwen2-vl")
    text = qwen.config.text_config
    text.sliding_window, text.layer_types = 16, ["sliding_attention"] * text.num_hidden_layers
    with pytest.raises(UnsupportedModelError, match="sliding window of 16"):
        sparsemm.patch(qwen, config())


def test_bad_arguments():
    model = toy_model("llava-vicuna")
    with pytest.raises(UnsupportedModelError, match="not supported"):
        sparsemm.patch(model.model, config())
    with pytest.raises(ConfigError, match="CompressionConfig"):
        sparsemm.patch(model, {"method": "snapkv"})
    with pytest.raises(ConfigError, match="reserve"):
        sparsemm.patch(model, config(), reserve=0)
    wrong = sparsemm.HeadScores(torch.ones(5, 4, dtype=torch.float64))
    with pytest.raises(HeadScoreError):
        sparsemm.patch(model, config("sparsemm", 12, head_scores=wrong))
    # a refused patch leaves nothing behind
    with sparsemm.patch(model, config()) as handle, pytest.raises(CacheError, match="no prompt"):
        _ = handle.stats


def test_bf16_and_attention_with_gradients_enabled():
    model = toy_model("llava-mistral", dtype=torch.bfloat16)
    inputs = toy_inputs(model, 2)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with sparsemm.patch(model, config("adakv", 12)) as handle:
        model.generate(**inputs, max_new_tokens=3)
        assert handle.stats.effective_budget == 12
        out = model(**inputs, use_cache=True)  # no torch.no_grad: nothing of the graph may stay in the cache
        assert all(not layer.key_buffer.requires_grad for layer in out.past_key_values.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_row_is_that_of_the_models_own_rotation(family):
    model = toy_model(family)
    inputs, token, found = toy_inputs(model, 2), torch.tensor([[5], [9]]), []
    settings = config("mask", None, head_scores=scores(model), mask_ratio=0.4, mask_mode="zero_query")
    with sparsemm.patch(model, settings) as handle:
        assert all(each.interleaved is not None for each in handle.projections)
        for operator, gradients in (("rope_append", False), ("append", True)):  # the first has no gradient
            with torch.no_grad():
                cache = model(**inputs, use_cache=True).past_key_values
            with torch.set_grad_enabled(gradients):
                count = count_operators(lambda: found.append(model(input_ids=token, past_key_values=cache)))  # noqa: B023
            assert count.names[f"sparsemm.{operator}.default"] == len(cache.layers)
    one, other = found
    torch.testing.assert_close(one.logits, other.logits, check_device=False)
    for layer, expected in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        assert torch.equal(layer.lens, expected.lens)
        newest = (layer.offsets[:-1] + layer.lens - 1).long()
        torch.testing.assert_close(layer.key_buffer[newest], expected.key_buffer[newest])
        torch.testing.assert_close(layer.value_buffer[newest], expected.value_buffer[newest])


class Int8Linear(torch.nn.Module):
    """A projection as quantisation libraries leave it: whole numbers and scales, no `weight`."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("numbers", (linear.weight.detach() / scales).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.numbers * self.scales, self.bias)


def test_quantised_projections():
    model = toy_model("qwen2-vl")
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    inputs = toy_inputs(model, 2)
    _, expected, _ = greedy(model, inputs)
    with sparsemm.patch(model, config("fullkv", None)):
        assert_close(greedy(model, inputs)[1], expected)
    with sparsemm.patch(model, config("mask", None, head_scores=scores(model), mask_ratio=0.4)):
        assert not torch.allclose(greedy(model, inputs)[1][0], expected[0], atol=1e-4)


# -- what happens to a model under a patch -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "text model", "layer", "attention"])
def test_a_patched_model_is_not_copied(part):
    model = toy_model("llava-vicuna")
    text_model = model.model.language_model
    layer = text_model.layers[1]
    chosen = {"model": model, "text model": text_model, "layer": layer, "attention": layer.self_attn}[part]
    with sparsemm.patch(model, config()):
        with pytest.raises(PatchError, match="remove the patch first"):
            copy.deepcopy(chosen)
        with pytest.raises(PatchError, match="remove the patch first"):
            pickle.dumps(chosen)
    twin = copy.deepcopy(model)
    inputs = toy_inputs(model, 1)
    with sparsemm.patch(twin, config(budget=10)):
        assert torch.equal(greedy(twin, inputs)[1], greedy(_patched(copy.deepcopy(model)), inputs)[1])
    assert torch.equal(greedy(twin, inputs)[1], greedy(model, inputs)[1])


def _patched(model):
    sparsemm.patch(model, config(budget=10))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("used", [False, True])
def test_a_model_dropped_under_its_patch_is_freed(family, used):
    model = toy_model(family)
    handle = sparsemm.patch(model, config())
    if used:
        sparsemm.generate(model, text_inputs(20), max_new_tokens=3)
    alive = weakref.ref(model.model.language_model)
    del model, handle
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights_are_refused_not_left_out(implementation):
    model = toy_model("llava-vicuna", attn_implementation=implementation)
    inputs = toy_inputs(model, 1)
    with sparsemm.patch(model, config()) as handle:
        for ask in (
            lambda: model(**inputs, output_attentions=True),
            lambda: model.generate(**inputs, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
        ):
            with pytest.raises(ConfigError, match="output_attentions"):
                ask()
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True, use_cache=False).attentions
        assert len(weights) == (2 if implementation == "eager" else 0)
        del handle


def test_sliding_layers_keep_their_own_forward_and_the_plan_knows_them():
    model = toy_vlm("gemma3")[0]
    layers = family_of(model).text_model(model).layers
    before = [layer.self_attn.forward for layer in layers]
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        now = [layer.self_attn.forward for layer in layers]
        assert [one == other for one, other in zip(before, now, strict=True)] == [True, False, True, False]
        assert [each is None for each in handle.projections] == [True, False, True, False]
        assert handle.plan.sliding_windows == (12, None, 12, None)
    assert [layer.self_attn.forward for layer in layers] == before
    with sparsemm.patch(toy_model("llava-vicuna"), config("snapkv", 12)) as handle:
        assert handle.plan.sliding_windows == ()


def test_images_behind_a_filled_cache_are_refused():
    """Where they attend to each other in both directions."""
    model, processor = toy_vlm("gemma3")
    image = Image.new("RGB", (40, 30), (10, 200, 30))
    inputs = dict(family_of(model).build_inputs(processor, [image], ["Read."]))
    with sparsemm.patch(model, config("snapkv", 12)), torch.no_grad():
        first = model(**inputs, use_cache=True).past_key_values
        seen = first.get_seq_length()
        twice = torch.cat([torch.ones(1, seen, dtype=torch.long), inputs["attention_mask"]], dim=1)
        with pytest.raises(CacheError, match="give all images with the first prompt"):
            model(**inputs | {"attention_mask": twice}, past_key_values=first)
        assert first.get_seq_length() == seen
        with pytest.raises(CacheError, match="in one forward"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=12)
        text = torch.tensor([[20, 21]])  # text may follow
        kinds = {"token_type_ids": torch.zeros_like(text), "attention_mask": twice[:, : seen + 2]}
        model(input_ids=text, **kinds, past_key_values=first)
        assert first.get_seq_length() == seen + 2


@pytest.mark.parametrize("method", ["expected_attention", "vl_cache"])
def test_later_turns_are_chosen_among_by_what_the_method_sees(method):
    """Two turns of several tokens under "every": the second one's rotations and image tokens are told, too."""
    model, inputs = toy_model("llava-mistral"), text_inputs(30)
    with sparsemm.patch(model, config(method, 12, compress_turns="every")) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        second = text_inputs(20, seed=1)["input_ids"]
        model(input_ids=second, attention_mask=torch.ones(1, 50, dtype=torch.long), past_key_values=cache)
        assert handle.stats.effective_budget == 12 and handle.stats.prompt_tokens == [50]

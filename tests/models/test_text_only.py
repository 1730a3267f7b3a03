"""Language models without images: loading, prompts, the command line's way to them, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from greedy_runs import config
from PIL import Image
from toy_vlms import toy_vlm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)

import sparsemm
from sparsemm.errors import ConfigError, DataError, UnsupportedModelError
from sparsemm.models import family_of, load_model


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, object]:
    return toy_vlm("llama")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_saved_folder_loads_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    model, processor = toy_vlm(name)
    model.save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(tmp_path)  # as the folders of the hub: no processor
    loaded, loaded_processor = load_model(tmp_path)
    build = family_of(model).build_inputs
    before = build(processor, None, ["Read this.", "And that one, please."])
    after = family_of(loaded).build_inputs(loaded_processor, None, ["Read this.", "And that one, please."])
    assert set(after) == {"input_ids", "attention_mask"} and torch.equal(before["input_ids"], after["input_ids"])
    assert not after["attention_mask"][0].all() and after["attention_mask"][:, -1].all()
    with sparsemm.patch(loaded, config("snapkv", 12)) as handle:
        ids = loaded.generate(**after, max_new_tokens=4)
        assert handle.stats.effective_budget == 12
    assert len(loaded_processor.batch_decode(ids)) == 2


def test_prompts_and_messages(llama: tuple[PreTrainedModel, object]) -> None:
    model, processor = llama
    family = family_of(model)
    assert processor.decode(family.build_inputs(processor, None, "Hi")["input_ids"][0]) == "<s>user: Hiassistant: "
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    plain = [{"role": "user", "content": "Hi"}]
    inputs = family.build_inputs(processor, None, [plain, parts, "Hi"])
    assert all(torch.equal(row, inputs["input_ids"][0]) for row in inputs["input_ids"])
    assert family.image_token_layout(model.config, inputs) == [[], [], []]


def test_without_a_chat_template_the_prompt_is_read_as_it_is(
    llama: tuple[PreTrainedModel, object], tmp_path: Path
) -> None:
    model, processor = llama
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    _, loaded = load_model(tmp_path)
    assert loaded.decode(family_of(model).build_inputs(loaded, None, "Hi")["input_ids"][0]) == "Hi"


def test_images_and_pixel_limits_are_refused(llama: tuple[PreTrainedModel, object], tmp_path: Path) -> None:
    model, processor = llama
    page = Image.new("RGB", (8, 8))
    build = family_of(model).build_inputs
    with pytest.raises(DataError, match="reads text only"):
        build(processor, [page], ["Read."])
    with pytest.raises(DataError, match="reads text only"):
        build(processor, None, [[{"role": "user", "content": [{"type": "image", "image": page}]}]])
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="max_pixels"):
        load_model(tmp_path, max_pixels=100)


SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def test_language_models_that_cannot_be_served_say_why() -> None:
    gemma = AutoConfig.for_model("gemma2", **SIZES, num_key_value_heads=1, head_dim=16, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="layer 1 .*soft cap"):
        sparsemm.patch(AutoModelForCausalLM.from_config(gemma), config())
    gemma.layer_types = ["full_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="layer 0 .*soft cap"):
        sparsemm.patch(AutoModelForCausalLM.from_config(gemma), config())
    with pytest.raises(UnsupportedModelError, match="GPTNeoXForCausalLM is not built of model.layers"):
        sparsemm.patch(AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)), config())
    with pytest.raises(UnsupportedModelError, match="LlamaModel is not supported; use the whole model, unwrapped"):
        sparsemm.patch(LlamaModel(AutoConfig.for_model("llama", **SIZES)), config())


def test_prefix_masks_are_refused() -> None:
    pali = PaliGemmaConfig(
        text_config=dict(model_type="gemma", **SIZES, num_key_value_heads=1, head_dim=16, pad_token_id=0),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, image_size=28, patch_size=7,
        ),
        projection_dim=32,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="makes attention masks of its own .prefix masks"):
        sparsemm.patch(PaliGemmaForConditionalGeneration(pali), config())

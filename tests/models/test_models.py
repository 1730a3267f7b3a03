"""Loading, prompts and processors: what is saved loads again, and batches equal single rows."""

from __future__ import annotations

import base64
import copy
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import BOS_ID, FAMILIES, IMAGE_ID, PAD_ID, VIDEO_ID, toy_inputs, toy_model, toy_processor
from toy_vlms import toy_vlm
from transformers import LlamaConfig, MllamaConfig, pipeline

from sparsemm.errors import ConfigError, DataError, UnsupportedModelError
from sparsemm.models import family_of, load_model
from sparsemm.models.llava_next import LlavaNext
from sparsemm.models.loading import resolve_device
from sparsemm.models.parallel import check_plan
from sparsemm.models.processing import still_images


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def save(family: str, folder: Path) -> tuple[torch.nn.Module, object]:
    model, processor = toy_model(family), toy_processor(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_with_the_same_outputs(family: str, tmp_path: Path) -> None:
    model, processor = save(family, tmp_path)
    loaded, loaded_processor = load_model(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    images, prompts = [picture(40, 40), picture(70, 20)], ["Read this.", "And that one, please."]
    before = family_of(model).build_inputs(processor, images, prompts)
    after = family_of(loaded).build_inputs(loaded_processor, images, prompts)
    assert set(before) == set(after)
    with torch.no_grad():
        assert torch.equal(model(**before).logits, loaded(**after).logits)


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_by_name_or_object(name: object, dtype: torch.dtype, tmp_path: Path) -> None:
    save("qwen2-vl", tmp_path)
    assert load_model(tmp_path, dtype=name)[0].dtype == dtype


def test_qwen_processor_saves_what_auto_processor_needs(tmp_path: Path) -> None:
    toy_processor("qwen2-vl").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2VLProcessor"
    video, image = saved["video_processor"], saved["image_processor"]
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert "image_processor_type" not in video
    for shared in ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std"):
        assert video[shared] == image[shared], shared


@pytest.mark.parametrize("saved_by", ["torchvision", "without"])
def test_qwen_folder_of_either_kind_loads(saved_by: str, tmp_path: Path) -> None:
    toy_processor("qwen2-vl").save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    if saved_by == "torchvision":
        saved["image_processor"]["image_processor_type"] = "Qwen2VLImageProcessorFast"
        saved["video_processor"] |= {"fps": 2.0, "do_sample_frames": True, "min_frames": 4, "max_frames": 768}
    else:
        del saved["video_processor"]
    path.write_text(json.dumps(saved))
    processor = still_images("Qwen2VLProcessor").from_pretrained(tmp_path)
    assert processor.image_token_id == IMAGE_ID and processor.video_token_id == VIDEO_ID
    assert processor.image_processor.patch_size == 4
    assert "video_processor" in processor.to_dict()


def test_qwen_folder_in_the_layout_of_the_hub_loads(tmp_path: Path) -> None:
    model, processor = save("qwen2-vl", tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    settings |= {"min_pixels": 64, "max_pixels": 4096, "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    _, loaded = load_model(tmp_path)
    family, page = family_of(model), picture(52, 33)
    expected, found = (family.build_inputs(one, [page], ["Read."]) for one in (processor, loaded))
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_llava_processor_without_patch_size_takes_it_from_the_model(tmp_path: Path) -> None:
    model, processor = save("llava-vicuna", tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        saved.pop(name)
    path.write_text(json.dumps(saved))
    loaded, loaded_processor = load_model(tmp_path)
    inputs = family_of(loaded).build_inputs(loaded_processor, [picture(50, 20)], ["Read."])
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_videos_are_refused_clearly() -> None:
    with pytest.raises(DataError, match="still images only"):
        toy_processor("qwen2-vl")(text=["<|video_pad|>"], videos=[np.zeros((4, 3, 16, 16))])


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_left_padded_and_each_row_is_as_alone(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    build = family_of(model).build_inputs
    images, prompts = [picture(40, 40), picture(70, 20), picture(9, 30)], ["a", "b long prompt", "c"]
    batch = build(processor, images, prompts)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD_ID).all()
    assert (batch["attention_mask"].diff(dim=1) >= 0).all(), "padding stands on the left"
    new = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        single = build(processor, [image], [prompt])
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        assert batch["attention_mask"][row].sum() == length
        assert torch.equal(model.generate(**single, max_new_tokens=6)[0, length:], new[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_beginning_of_text_is_written_once(family: str) -> None:
    processor = toy_processor(family)
    # A tokenizer that adds the token itself, as Llama's does, under a template that writes it as well.
    from tokenizers.processors import TemplateProcessing

    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    assert processor.tokenizer("x").input_ids[0] == BOS_ID
    inputs = family_of(toy_model(family)).build_inputs(processor, [picture(20, 20)], ["Read."])
    assert (inputs["input_ids"] == BOS_ID).sum() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_give_the_inputs_of_the_prompt(family: str, tmp_path: Path) -> None:
    processor, build = toy_processor(family), family_of(toy_model(family)).build_inputs
    page = picture(40, 24)
    page.save(tmp_path / "page.png")
    encoded = io.BytesIO()
    page.save(encoded, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    expected = build(processor, page, "Read.")
    for source in (page, str(tmp_path / "page.png"), (tmp_path / "page.png").as_uri(), uri):
        content = [{"type": "image", "image": source}, {"type": "text", "text": "Read."}]
        found = build(processor, None, [{"role": "user", "content": content}])
        for name in expected:
            assert torch.equal(expected[name], found[name]), (name, source)
    linked = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Read."}]
    found = build(processor, None, [{"role": "user", "content": linked}])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    empty_place = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    beside = build(processor, [page], [empty_place])
    assert torch.equal(beside["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_without_image(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    inputs = family_of(model).build_inputs(processor, None, ["Hello", "What is that?"])
    assert "pixel_values" not in inputs and (inputs["input_ids"] != IMAGE_ID).all()
    assert family_of(model).image_token_layout(model.config, inputs) == [[], []]
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_mm_token_type_ids_mark_the_image_tokens() -> None:
    processor = toy_processor("qwen2-vl")
    inputs = family_of(toy_model("qwen2-vl")).build_inputs(processor, [picture(40, 40), None], ["one", "two words"])
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == IMAGE_ID).long())
    assert inputs["mm_token_type_ids"].sum() == 25


def test_pixel_limits(tmp_path: Path) -> None:
    model, _ = save("qwen2-vl", tmp_path)
    layout = family_of(model).image_token_layout
    for limits, tokens in (({}, 64), ({"max_pixels": 256}, 4), ({"min_pixels": 96 * 96, "max_pixels": 96 * 96}, 144)):
        _, processor = load_model(tmp_path, **limits)
        inputs = family_of(model).build_inputs(processor, [picture(64, 64)], ["Read."])
        assert len(layout(model.config, inputs)[0][0]) == tokens
    with pytest.raises(ConfigError, match="max_pixels"):
        load_model(tmp_path, min_pixels=100_000)
    with pytest.raises(ConfigError, match="min_pixels=0"):
        load_model(tmp_path, min_pixels=0)
    other = tmp_path / "llava"
    save("llava-vicuna", other)
    with pytest.raises(ConfigError, match="fixed sizes"):
        load_model(other, max_pixels=1000)


def test_addresses_go_through_qwen_vl_utils_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, build = toy_processor("qwen2-vl"), family_of(toy_model("qwen2-vl")).build_inputs
    content = [{"type": "image", "image": "https://example.org/page.png"}, {"type": "text", "text": "Read."}]
    messages = [{"role": "user", "content": content}]
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)
    with pytest.raises(DataError, match=r"\[qwen\]"):
        build(processor, None, [messages])
    fake = types.ModuleType("qwen_vl_utils")
    fake.process_vision_info = lambda conversation: ([picture(40, 40)], None)
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", fake)
    assert torch.equal(
        build(processor, None, [messages])["pixel_values"],
        build(processor, picture(40, 40), "Read.")["pixel_values"],
    )


def test_bad_images_and_prompts_are_clear_errors(tmp_path: Path) -> None:
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    build = family_of(model).build_inputs
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    for source, message in (
        (tmp_path / "none.png", "does not exist"),
        (tmp_path / "broken.png", "cannot be read"),
        ("data:image/png;base64,???", "cannot be read"),
        ("https://example.org/a.png", "not a local file"),
        (17, "int"),
    ):
        with pytest.raises(DataError, match=message):
            build(processor, [source], ["Read."])
    with pytest.raises(DataError, match="2 image entries for 1 prompts"):
        build(processor, [picture(9, 9), picture(9, 9)], ["Read."])
    with pytest.raises(DataError, match="a prompt is text"):
        build(processor, [picture(9, 9)], [3])
    processor.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        build(processor, [picture(9, 9)], ["Read."])


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    model = toy_model("llava-vicuna")
    with pytest.raises(UnsupportedModelError, match="LlavaNextModel is not supported"):
        family_of(model.model)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        family_of(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="'mllama' is not supported; .*LlavaNextForConditionalGeneration"):
        family_of(MllamaConfig())
    MllamaConfig().save_pretrained(tmp_path / "mllama")
    with pytest.raises(UnsupportedModelError, match="'mllama'"):
        load_model(tmp_path / "mllama")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        load_model(tmp_path / "odd")


def test_code_that_lies_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    named = {"AutoConfig": "code.OddConfig", "AutoModelForImageTextToText": "code.Odd", "AutoProcessor": "code.Odd"}
    config = {"model_type": "odd", "auto_map": named}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OddConfig: pass\nclass Odd: pass\n")
    with pytest.raises(UnsupportedModelError, match="no known model type"):
        load_model(tmp_path)
    save("qwen2-vl", tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**stored, "auto_map": named}))
    (tmp_path / "model" / "code.py").write_bytes((tmp_path / "code.py").read_bytes())
    load_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no folder"):
        load_model("./models/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json"):
        load_model(tmp_path / "empty")
    save("qwen2-vl", tmp_path / "model")
    with pytest.raises(ConfigError, match="float7"):
        load_model(tmp_path / "model", dtype="float7")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="missing or unreadable"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_takes_model_and_processor(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    page = picture(40, 24)
    content = [{"type": "image", "image": page}, {"type": "text", "text": "Read."}]
    reader = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    answer = reader(
        text=[{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False, generate_kwargs={}
    )
    inputs = family_of(model).build_inputs(processor, page, "Read.")
    new = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == processor.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_toy_rows_differ_and_generate(family: str) -> None:
    """The shared toy inputs are what they claim: padded left, one image a row, accepted by the model."""
    model = toy_model(family)
    inputs = toy_inputs(model, 3)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set((inputs["input_ids"] == IMAGE_ID).sum(1).tolist())) == 3
    assert lengths.max() == inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_new_tokens=2).shape == (3, inputs["input_ids"].shape[1] + 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [3, 30])
def test_a_random_image_is_one_that_the_model_takes(family: str, limit: int) -> None:
    model = toy_model(family)
    own = family_of(model)
    image = own.random_image(model.config, torch.float32, limit)
    if not image:  # none of so few tokens
        return
    (layout,) = own.image_layouts(model.config, image)
    ids = torch.full((1, len(layout) + 2), 20)
    ids[:, 1:-1] = model.config.image_token_id
    inputs = own.finish_inputs(model.config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image})
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == ids.shape and bool(logits.isfinite().all())


def test_pan_and_scan_is_as_gemma3_has_it_unless_the_checkpoint_says_otherwise() -> None:
    model, processor = toy_vlm("gemma3")
    processor = copy.deepcopy(processor)
    published = {"do_pan_and_scan": False, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4}
    for name, value in published.items():
        setattr(processor.image_processor, name, None)
        assert family_of(model).call_options(processor)[name] == value, name
    processor.image_processor.do_pan_and_scan = True
    assert family_of(model).call_options(processor)["do_pan_and_scan"] is True


def test_devices_are_those_that_torch_sees() -> None:
    assert resolve_device("auto") == "auto" and resolve_device("cpu") == torch.device("cpu")
    for device in ("foo", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"device='{device}' is"):
            resolve_device(device)


@pytest.mark.parametrize(("device", "placed"), [("cpu", {}), ("auto", {"device_map": "auto"})])
def test_layers_are_spread_over_devices_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: str, placed: dict[str, str]
) -> None:
    given: dict[str, Any] = {}
    load = LlavaNext.load_weights

    def noted(family: LlavaNext, path: str, **options: Any) -> Any:
        given.update(options)
        return load(family, path, **{name: value for name, value in options.items() if name != "device_map"})

    monkeypatch.setattr(LlavaNext, "load_weights", noted)
    load_model(Path(__file__).parents[2] / "assets" / "miniatures" / "llava-vicuna", device=device)
    assert {name: value for name, value in given.items() if name == "device_map"} == placed


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "refused"), [(6, 3, "the 3 kv heads"), (6, 6, "the 6 kv heads")])
def test_a_plan_whose_heads_do_not_divide_says_which(num_heads: int, num_kv_heads: int, refused: str) -> None:
    config = LlamaConfig(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, hidden_size=48)
    check_plan(config, 3)
    with pytest.raises(ConfigError, match=f"{refused} of the model do not divide"):
        check_plan(config, 4)
    config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}
    with pytest.raises(ConfigError, match="the 6 query heads of the model do not divide"):
        check_plan(config, 4)

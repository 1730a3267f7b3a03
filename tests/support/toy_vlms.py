"""Toys of every family, and of language models, with their real processors: random weights, one token a character."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sparsemm.errors import DataError
from sparsemm.models import load_model
from sparsemm.models.processing import TextProcessor, still_images

VOCAB_SIZE = 256
CHARACTERS = "".join(map(chr, range(32, 127)))
TILE = 28
"""Pixels of a tile; patches of 7 make 4 x 4 of them, merged 2 x 2 where a family merges."""

TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_SLIDING: dict[str, Any] = dict(
    num_hidden_layers=4, sliding_window=12, query_pre_attn_scalar=24,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_CLIP = dict(model_type="clip_vision_model", image_size=TILE, patch_size=7, projection_dim=32, **_VISION)
_SIGLIP = dict(model_type="siglip_vision_model", image_size=TILE, patch_size=7, vision_use_head=False, **_VISION)
_SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<start>", "<end>", "<fake_token_around_image>",
    "<global-img>", "<end_of_utterance>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>", *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ID = {name: index if index < 4 else 100 + index for index, name in enumerate(_SPECIAL)}
_TEMPLATE = (
    "<s>{{% for message in messages %}}{{{{ message['role'] }}}}: {{% for part in message['content'] %}}"
    "{{% if part['type'] in ('image', 'image_url') %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)


@functools.cache
def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a character, and every special token that a family's processor asks for; `special` names more."""
    vocabulary = {character: 4 + index for index, character in enumerate(CHARACTERS)} | ID
    taken = set(vocabulary.values())
    vocabulary |= {f"[{index}]": index for index in range(VOCAB_SIZE) if index not in taken}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": "<start>",
            "end_image_token": "<end>",
            "context_image_token": "<image>",
            "video_token": "<video>",
            **special,
        },
    )


def _llava() -> tuple[Any, ProcessorMixin]:
    config = transformers.LlavaConfig(
        vision_config=_CLIP, text_config={"model_type": "llama", **TEXT}, image_token_index=ID["<image>"]
    )
    images = LlavaImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_pad=False, do_center_crop=True
    )
    return config, _processor("LlavaProcessor", images, patch_size=7, vision_feature_select_strategy="default",
                              num_additional_image_tokens=1)  # fmt: skip


def _llava_padded() -> tuple[Any, ProcessorMixin]:
    config, processor = _llava()
    processor.image_processor.do_pad = True
    return config, processor


def _llava_onevision() -> tuple[Any, ProcessorMixin]:
    pinpoints = [[TILE * rows, TILE * cols] for rows in range(1, 5) for cols in range(1, 5)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=_SIGLIP, text_config={"model_type": "qwen2", **TEXT}, image_token_index=ID["<image>"],
        video_token_index=ID["<video>"], image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=pinpoints)
    return config, _processor("LlavaOnevisionProcessor", images, num_image_tokens=16,
                              vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4")  # fmt: skip


def _internvl(text: str = "qwen2") -> tuple[Any, ProcessorMixin]:
    config = transformers.InternVLConfig(
        vision_config=dict(image_size=[TILE, TILE], patch_size=[7, 7], **_VISION),
        text_config={"model_type": text, **TEXT}, image_token_id=ID["<image>"], image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, min_patches=1, max_patches=6)
    return config, _processor("InternVLProcessor", images, image_seq_length=4)


def _glm4v() -> tuple[Any, ProcessorMixin]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=dict(
            depth=2, hidden_size=32, num_heads=2, patch_size=4, intermediate_size=48, out_hidden_size=64, image_size=28
        ),
        image_token_id=ID["<|image|>"], video_token_id=ID["<|video|>"],
        image_start_token_id=ID["<|begin_of_image|>"], image_end_token_id=ID["<|end_of_image|>"],
        video_start_token_id=ID["<|begin_of_video|>"], video_end_token_id=ID["<|end_of_video|>"],
    )  # fmt: skip
    images = Glm4vImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 2 * 8 * 8, "longest_edge": 2 * 64 * 64}
    )
    return config, _processor("Glm4vProcessor", images, image="<|begin_of_image|><|image|><|end_of_image|>")


def _qwen_vl(name: str, text: dict[str, Any], **vision: Any) -> tuple[Any, ProcessorMixin]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = transformers.AutoConfig.for_model(
        name,
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, out_hidden_size=64, **vision
        ),
        image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"],
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    processor_class = {"qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(name, "Qwen3VLProcessor")
    return config, _processor(processor_class, images, image="<|vision_start|><|image_pad|><|vision_end|>")


def _qwen2_5_vl() -> tuple[Any, ProcessorMixin]:
    return _qwen_vl("qwen2_5_vl", {}, window_size=16, fullatt_block_indexes=[1])


def _qwen3_vl(name: str = "qwen3_vl", **text: Any) -> tuple[Any, ProcessorMixin]:
    return _qwen_vl(name, text, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])


def _gemma3(pan_and_scan: bool = False) -> tuple[Any, ProcessorMixin]:
    config = transformers.Gemma3Config(
        vision_config={**_SIGLIP, "image_size": 2 * TILE},
        text_config={"model_type": "gemma3_text", **TEXT, **_SLIDING}, mm_tokens_per_image=16,
        image_token_index=ID["<image>"], boi_token_index=ID["<start>"],
        eoi_token_index=ID["<end>"], tie_word_embeddings=False,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(
        size={"height": 2 * TILE, "width": 2 * TILE}, do_pan_and_scan=pan_and_scan or None,
        pan_and_scan_min_crop_size=16,
    )  # fmt: skip
    special = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return config, _processor("Gemma3Processor", images, image="<start>", special=special, image_seq_length=16)


def _mistral3() -> tuple[Any, None]:
    """Without its processor, which imports torchvision; `mistral3_inputs` stands in for it."""
    config = transformers.Mistral3Config(
        vision_config=dict(model_type="pixtral", image_size=8 * TILE, patch_size=7, head_dim=16, **_VISION),
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=ID["<image>"], spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return config, None


def mistral3_inputs(images: Sequence[Tensor], texts: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of a batch with one image `[3, height, width]` a row, as PixtralProcessor makes them: every row of image
    tokens ends with a token of its own, the last with another."""
    rows = []
    for image, text in zip(images, texts, strict=True):
        lines, per_line = (extent // 14 for extent in image.shape[1:])
        line = [*[ID["<image>"]] * per_line, ID["<start>"]]
        rows.append([1, *(line * lines)[:-1], ID["<end>"], *(4 + CHARACTERS.index(character) for character in text)])
    longest = max(map(len, rows))
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.stack(
        [nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )
    sizes = torch.tensor([image.shape[1:] for image in images])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


def _language_model(name: str, **settings: Any) -> tuple[Any, ProcessorMixin]:
    template = (
        "<s>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return transformers.AutoConfig.for_model(name, **{**TEXT, **settings}), TextProcessor(tokenizer(), template)


def _idefics3(name: str = "Idefics3") -> tuple[Any, ProcessorMixin]:
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(image_size=TILE, patch_size=7, **_VISION), text_config={"model_type": "llama", **TEXT},
        image_token_id=ID["<image>"], scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    tiler = {"Idefics3": Idefics3ImageProcessorPil, "SmolVLM": SmolVLMImageProcessorPil}[name]
    images = tiler(size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE})
    return config, _processor(f"{name}Processor", images, image_seq_len=4)


def _processor(
    name: str, image_processor: Any, *, image: str = "<image>", special: dict[str, str] | None = None, **settings: Any
) -> ProcessorMixin:
    template = _TEMPLATE.format(image=image)
    return still_images(name)(image_processor, tokenizer(**special or {}), chat_template=template, **settings)


TOYS: dict[str, Callable[[], tuple[Any, ProcessorMixin]]] = {
    "llava": _llava,
    "llava, padded": _llava_padded,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "internvl, qwen3": lambda: _internvl("qwen3"),
    "glm4v": _glm4v,
    "gemma3": _gemma3,
    "gemma3, crops": lambda: _gemma3(pan_and_scan=True),
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": lambda: _qwen3_vl("qwen3_vl_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
}

_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LANGUAGE_MODELS: dict[str, Callable[[], tuple[Any, ProcessorMixin]]] = {
    "llama": lambda: _language_model("llama"),
    "mistral": lambda: _language_model("mistral", sliding_window=None),
    "qwen2": lambda: _language_model("qwen2"),
    "qwen3": lambda: _language_model("qwen3"),
    "phi3": lambda: _language_model("phi3", sliding_window=None, **_PLAIN_ROPE),
    "smollm3": lambda: _language_model("smollm3", no_rope_layers=[1, 0]),
    "gemma3_text": lambda: _language_model("gemma3_text", **_SLIDING),
    "gemma3_text, none sliding": lambda: _language_model("gemma3_text", layer_types=["full_attention"] * 2),
    "cohere2": lambda: _language_model(
        "cohere2", num_hidden_layers=4, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "granite": lambda: _language_model(
        "granite", attention_multiplier=0.4, embedding_multiplier=3.0, residual_multiplier=0.7, logits_scaling=2.0
    ),
}


def toy_vlm(name: str, *, seed: int = 0, attn_implementation: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of a family and its processor; the test is skipped where these need a missing package."""
    from sparsemm.models import family_of

    try:
        config, processor = (TOYS | LANGUAGE_MODELS | {"mistral3": _mistral3})[name]()
    except ImportError as error:
        pytest.skip(str(error))
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = getattr(transformers, family_of(config).model_class)
        model = (make.from_config(config) if hasattr(make, "from_config") else make(config)).eval()
        for parameter_name, parameter in model.named_parameters():  # features must not drown in the text
            if parameter.ndim == 2 and any(part in parameter_name for part in ("projector", "connector", "merger")):
                torch.nn.init.normal_(parameter, std=0.15)
        # A logit of 0 is never the largest: image tokens and padding are not generated.
        model.get_output_embeddings().weight.data[[0, *ID.values()]] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def load_or_skip(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """`load_model` on the CPU; skipped where transformers (5.17) wants torchvision for more image processors."""
    try:
        return load_model(folder, device="cpu")
    except DataError as error:
        assert "needs a package that is not here" in str(error)
        pytest.skip(str(error))

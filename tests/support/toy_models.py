"""Tiny random models of the three families, and inputs for them that need no tokenizer. Shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sparsemm.miniatures.architectures import Dimensions
from sparsemm.models.processing import still_images

FAMILIES = ("llava-vicuna", "llava-mistral", "qwen2-vl")

VOCAB_SIZE = 128
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID = 120, 121, 122, 123
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 119

# Original (height, width) of the images of a batch, in turn: square, wide, tall, and smaller than the grid.
LLAVA_IMAGE_SIZES = ((40, 40), (20, 52), (57, 18), (9, 7))
# Patches (t, h, w) before the 2 x 2 merge.
QWEN_GRIDS = ((1, 8, 8), (1, 4, 12), (1, 10, 6), (1, 2, 4))

TINY_MINIATURE = Dimensions(
    num_layers=2,
    hidden_size=128,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    vision_layers=1,
    vision_size=32,
    vision_heads=2,
    vision_intermediate=64,
    rope_theta=4.0,
)
"""An untrained miniature: a model with a processor of its own that reads pages and text."""


def toy_model(
    family: str,
    *,
    num_layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A random model in eval mode: query heads of dimension 16, 4 of them (hidden size 64), 128 tokens.

    `num_kv_heads` defaults to 4 (MHA) for "llava-vicuna" and to 2 (GQA) for the others. Weights are larger than
    transformers' defaults, so that attention is far from uniform and greedy text varies; no token ends the text.
    """
    text: dict = dict(
        vocab_size=vocab_size,
        hidden_size=16 * num_heads,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or (4 if family == "llava-vicuna" else 2),
        max_position_embeddings=4096,
        initializer_range=0.15,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    if family in ("llava-vicuna", "llava-mistral"):
        text_config = LlamaConfig(**text) if family == "llava-vicuna" else MistralConfig(**text, sliding_window=None)
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=7,
                projection_dim=32,
            ),
            text_config=text_config,
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
            image_seq_length=16,
        )
        model_class: type[PreTrainedModel] = LlavaNextForConditionalGeneration
    elif family == "qwen2-vl":
        config = Qwen2VLConfig(
            text_config={
                **text,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            vision_config=dict(
                depth=2, embed_dim=32, hidden_size=16 * num_heads, num_heads=2, mlp_ratio=2, patch_size=4
            ),
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
        )
        model_class = Qwen2VLForConditionalGeneration
    else:
        raise ValueError(f"unknown toy family {family!r}; choose one of {FAMILIES}")
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # transformers scales these by 0.02 whatever the text model's range; features would drown in the text.
        for name, parameter in model.named_parameters():
            if ("multi_modal_projector" in name or "visual.merger" in name) and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
        # A logit of 0 is never the largest: image tokens and padding are not generated.
        model.lm_head.weight.data[[PAD_ID, VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID]] = 0
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.do_sample = False
    return model


def toy_inputs(
    model: PreTrainedModel,
    batch_size: int = 1,
    text_lengths: Sequence[int] | None = None,
    seed: int = 0,
    *,
    with_images: bool = True,
) -> dict[str, Tensor]:
    """Inputs for `model.generate` or a forward: `input_ids`, `attention_mask` `[batch, seq_len]`, left padded.

    Each row holds one image (of a different size in each row of the batch) followed by `text_lengths[row]` random
    text tokens. With images also `pixel_values` and `image_sizes` `[batch, 2]` (LLaVA-NeXT), or `pixel_values`,
    `image_grid_thw` `[batch, 3]` and `mm_token_type_ids` `[batch, seq_len]` (Qwen2-VL).
    """
    lengths = list(text_lengths) if text_lengths is not None else [5 + 4 * row for row in range(batch_size)]
    if len(lengths) != batch_size:
        raise ValueError(f"{len(lengths)} text lengths for a batch of {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    is_qwen = model.config.model_type == "qwen2_vl"
    extras: dict[str, Tensor] = {}
    counts = [0] * batch_size
    if with_images and is_qwen:
        vision = model.config.vision_config
        grids = torch.tensor([QWEN_GRIDS[row % len(QWEN_GRIDS)] for row in range(batch_size)])
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        extras["pixel_values"] = torch.randn(int(grids.prod(-1).sum()), patch_dim, generator=generator).to(dtype)
        extras["image_grid_thw"] = grids
        counts = (grids.prod(-1) // vision.spatial_merge_size**2).tolist()
    elif with_images:
        sizes = torch.tensor([LLAVA_IMAGE_SIZES[row % len(LLAVA_IMAGE_SIZES)] for row in range(batch_size)])
        side = model.config.vision_config.image_size
        # One base tile and at most 2 x 2 more; the model reads only as many as the image's size calls for.
        extras["pixel_values"] = torch.randn(batch_size, 5, 3, side, side, generator=generator).to(dtype)
        extras["image_sizes"] = sizes
        with torch.no_grad():
            features = model.model.get_image_features(extras["pixel_values"], sizes, return_dict=True).pooler_output
        counts = [len(feature) for feature in features]

    rows = []
    for length, count in zip(lengths, counts, strict=True):
        words = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (length,), generator=generator)
        image = torch.full((count,), IMAGE_ID)
        if is_qwen and count:
            image = torch.cat([torch.tensor([VISION_START_ID]), image, torch.tensor([VISION_END_ID])])
        rows.append(torch.cat([torch.tensor([BOS_ID]), image, words]))
    longest = max(len(row) for row in rows)
    input_ids = torch.full((batch_size, longest), PAD_ID)
    attention_mask = torch.zeros((batch_size, longest), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, longest - len(row) :] = row
        attention_mask[index, longest - len(row) :] = 1
    if is_qwen and with_images:
        extras["mm_token_type_ids"] = (input_ids == IMAGE_ID).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, **extras}


def single_row(inputs, row):
    """Row `row` of toy inputs without its padding (one image a row)."""
    batch = inputs["input_ids"].shape[0]
    valid = inputs["attention_mask"][row].bool()
    single = {}
    for name, tensor in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            single[name] = tensor[row : row + 1, valid]
        elif name == "pixel_values" and "image_grid_thw" in inputs:
            patches = inputs["image_grid_thw"].prod(1)
            begin = int(patches[:row].sum())
            single[name] = tensor[begin : begin + int(patches[row])]
        else:
            assert tensor.shape[0] == batch
            single[name] = tensor[row : row + 1]
    return single


CHARACTERS = "".join(map(chr, range(32, 127)))
"""The text tokens of `toy_processor`: one character each, from `FIRST_TEXT_ID` on."""

_SPECIAL = {
    "llava": {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID, "<image>": IMAGE_ID, "<unk>": 124},
    "qwen2-vl": {
        "<pad>": PAD_ID,
        "<s>": BOS_ID,
        "</s>": EOS_ID,
        "<|vision_start|>": VISION_START_ID,
        "<|vision_end|>": VISION_END_ID,
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
        "<unk>": 124,
    },
}

_IMAGE_TEXT = {"llava": "<image>", "qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def toy_processor(family: str) -> ProcessorMixin:
    """A processor whose token ids and image sizes are those of `toy_model(family)`: one token a character."""
    kind = "qwen2-vl" if family == "qwen2-vl" else "llava"
    vocabulary = {character: FIRST_TEXT_ID + index for index, character in enumerate(CHARACTERS)}
    # Ids between the characters and the special tokens: the model may generate them.
    fillers = {f"[{index}]": index for index in range(VOCAB_SIZE)}
    taken = set(vocabulary.values()) | set(_SPECIAL[kind].values())
    vocabulary |= {name: index for name, index in fillers.items() if index not in taken} | _SPECIAL[kind]
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL[kind]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[name for name in _SPECIAL[kind] if name not in ("<pad>", "<s>", "</s>", "<unk>")],
        clean_up_tokenization_spaces=False,
    )
    template = (
        "<s>{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] in ('image', 'image_url') %}" + _IMAGE_TEXT[kind] + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    if kind == "qwen2-vl":
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
        )
        return still_images("Qwen2VLProcessor")(image_processor, tokenizer, chat_template=template)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )

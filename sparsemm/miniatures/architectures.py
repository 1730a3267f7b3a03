"""What a miniature is made of: the dimensions, and the Hugging Face configuration and processor of each family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsemm.errors import ConfigError
from sparsemm.miniatures.tokenizer import CHAT_TEMPLATES, QWEN, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

FAMILIES = ("llava-vicuna", "llava-mistral", *QWEN)

IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
"""CLIP's normalisation, which all families use."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one miniature. Pages are `page_size` pixels square; a `cell`-pixel cell is one image token."""

    num_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 384
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    vision_layers: int = 2
    vision_size: int = 192
    vision_heads: int = 6
    vision_intermediate: int = 768
    patch_size: int = 8
    page_size: int = 224
    cell: int = 16
    rope_theta: float = 10000.0


_CLIP = dict(vision_layers=3, patch_size=16)
_QWEN3 = Dimensions(
    rope_theta=4.0, patch_size=16, vision_layers=2, vision_size=160, vision_heads=5, vision_intermediate=512
)
DIMENSIONS = {
    "llava-vicuna": Dimensions(num_kv_heads=8, **_CLIP),
    "llava-mistral": Dimensions(num_kv_heads=4, **_CLIP),
    # The image spans 14 positions only, and width turns with the lowest frequencies: a small theta keeps it legible.
    "qwen2-vl": Dimensions(rope_theta=4.0),
    "qwen3-vl": _QWEN3,
    # Heads enough for shares of them to mean something, and prompts of 600 tokens.
    "qwen3-vl-wide": replace(_QWEN3, num_layers=6, num_heads=16, num_kv_heads=8, page_size=384, rope_theta=8.0),
}


def check_family(family: str) -> str:
    """`family` itself. Raises `ConfigError` when there is no such family."""
    if family not in FAMILIES:
        raise ConfigError(f"unknown miniature family {family!r}; use one of {', '.join(FAMILIES)}")
    return family


def build_config(family: str, dims: Dimensions | None = None) -> Any:
    """The Hugging Face configuration of `family`. Raises `ConfigError` for an unknown family."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, MistralConfig

    dims = dims or DIMENSIONS[check_family(family)]
    tokenizer = build_tokenizer(family)
    rope = {"rope_type": "default", "rope_theta": dims.rope_theta}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        max_position_embeddings=1024,
        rope_parameters=rope,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    text["head_dim"] = dims.head_dim
    if family in QWEN:
        return _qwen_config(family, dims, text)
    vision = CLIPVisionConfig(
        hidden_size=dims.vision_size,
        intermediate_size=dims.vision_intermediate,
        num_hidden_layers=dims.vision_layers,
        num_attention_heads=dims.vision_heads,
        image_size=dims.page_size // 2,
        patch_size=dims.patch_size,
        projection_dim=dims.vision_size,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text) if family == "llava-vicuna" else MistralConfig(sliding_window=None, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[dims.page_size, dims.page_size]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(dims.page_size // 2 // dims.patch_size) ** 2,
        tie_word_embeddings=True,
    )


def _qwen_config(family: str, dims: Dimensions, text: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig, Qwen3VLConfig

    tokenizer = build_tokenizer(family)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokens = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    vision = dict(
        depth=dims.vision_layers,
        num_heads=dims.vision_heads,
        patch_size=dims.patch_size,
        spatial_merge_size=dims.cell // dims.patch_size,
        temporal_patch_size=2,
    )
    if family == "qwen2-vl":
        vision |= dict(embed_dim=dims.vision_size, hidden_size=dims.hidden_size)
        vision["mlp_ratio"] = dims.vision_intermediate // dims.vision_size
        text["rope_parameters"]["mrope_section"] = [2, 5, 9]
        text["use_sliding_window"] = False
        del text["head_dim"]
        return Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=True)
    vision |= dict(hidden_size=dims.vision_size, out_hidden_size=dims.hidden_size)
    vision["intermediate_size"] = dims.vision_intermediate
    vision["num_position_embeddings"] = (dims.page_size // dims.patch_size) ** 2
    vision["deepstack_visual_indexes"] = [dims.vision_layers // 2]
    text["rope_parameters"] |= dict(mrope_section=[6, 5, 5], mrope_interleaved=True)
    return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=True)


def build_model(family: str, *, seed: int = 0, dims: Dimensions | None = None) -> PreTrainedModel:
    """An untrained float32 model of `family`, with an embedding table that depends on `seed` alone.

    The table's rows are random unit vectors: nearly orthogonal names, the same for every family's characters.
    """
    import torch
    import transformers

    config = build_config(family, dims)
    cls = getattr(transformers, type(config).__name__.replace("Config", "ForConditionalGeneration"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).float()
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(torch.nn.functional.normalize(torch.randn(table.shape, generator=generator), dim=-1))
        # What the vision tower adds between layers of the text is nothing at first: symbols are learned without it.
        for merger in getattr(getattr(model.model, "visual", None), "deepstack_merger_list", ()):
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    return model


def build_processor(family: str, dims: Dimensions | None = None) -> ProcessorMixin:
    """The family's own Hugging Face processor, with the page's sizes. Works without torchvision."""
    dims = dims or DIMENSIONS[check_family(family)]
    tokenizer = build_tokenizer(family)
    template = CHAT_TEMPLATES[family]
    tokenizer.chat_template = template
    if family in QWEN:
        from transformers import Qwen2VLImageProcessorPil

        from sparsemm.models.processing import still_images

        pixels = dims.page_size * dims.page_size
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=dims.patch_size,
            merge_size=dims.cell // dims.patch_size,
            temporal_patch_size=2,
            size={"shortest_edge": pixels, "longest_edge": pixels},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )
        return still_images(f"Qwen{2 if family == 'qwen2-vl' else 3}VLProcessor")(
            image_processor=image_processor, tokenizer=tokenizer, chat_template=template
        )
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    half = dims.page_size // 2
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": half},
        crop_size={"height": half, "width": half},
        image_grid_pinpoints=[[dims.page_size, dims.page_size]],
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=dims.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )

"""LLaVA-NeXT (v1.6) with a Llama/Vicuna or Mistral language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsemm.models.family import ModelFamily, pad_left, refuse_pixel_limits, use_pillow
from sparsemm.models.geometry import ImageLayout, base_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


class LlavaNext(ModelFamily):
    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    text_model_types = ("llama", "mistral")

    def load_processor(
        self, path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorMixin:
        from transformers import AutoConfig, LlavaNextProcessor

        refuse_pixel_limits(self.name, min_pixels, max_pixels)
        processor = use_pillow(LlavaNextProcessor.from_pretrained(path, trust_remote_code=False), path)
        # Early checkpoints leave to the model's configuration what the processor needs to count image tokens.
        if processor.patch_size is None or processor.vision_feature_select_strategy is None:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            if config.vision_config.model_type == "clip_vision_model":
                processor.num_additional_image_tokens = 1
        return pad_left(processor)

    def image_layouts(
        self, config: PretrainedConfig, inputs: Mapping[str, Tensor], **sources: Any
    ) -> list[ImageLayout]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
        return [base_layout(side, *unpadded_grid(config, tuple(size))) for size in sizes]


def unpadded_grid(config: PretrainedConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of high-resolution tokens left of an image of original (height, width) after unpadding.

    The processor fits the image into the best of the checkpoint's resolutions and pads it evenly; the model then drops
    the token rows or columns that hold nothing but padding. transformers decides by the original aspect ratio, and
    rounds as here (`unpad_image` in its modeling_llava_next).
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = image_size
    best_height, best_width = select_best_resolution([height, width], config.image_grid_pinpoints)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    rows = best_height // side * (side // patch)
    cols = best_width // side * (side // patch)
    if width / height > cols / rows:
        rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, cols


LLAVA_NEXT = LlavaNext()

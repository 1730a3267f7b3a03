"""LLaVA-1.5: one grid over the centre of the image, or over the square it is padded to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, Region, grid_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


class Llava(ModelFamily):
    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    processor_class = "LlavaProcessor"
    image_tokens = "one grid over the centre of the image, or over the square it is padded to"

    def load_processor(
        self, path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorMixin:
        from transformers import AutoConfig

        processor = super().load_processor(path, min_pixels=min_pixels, max_pixels=max_pixels)
        # Early checkpoints leave to the model's configuration what the processor needs to count image tokens.
        if processor.patch_size is None or processor.vision_feature_select_strategy is None:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            if config.vision_config.model_type == "clip_vision_model":
                processor.num_additional_image_tokens = 1
        return processor

    def image_layout(
        self, config: PretrainedConfig, inputs: Inputs, processor: ProcessorMixin, image_size: tuple[int, int]
    ) -> ImageLayout:
        rows, cols = (extent // config.vision_config.patch_size for extent in inputs["pixel_values"].shape[-2:])
        return grid_layout(rows, cols, region=_shown(processor.image_processor, image_size))


def _shown(image_processor: Any, image_size: tuple[int, int]) -> Region | None:
    """The pixels of an image of original (width, height) that the processor leaves; None for all of them."""
    width, height = image_size
    if getattr(image_processor, "do_pad", False):  # to a square, with the image in its middle
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return -left, -top, side - left, side - top
    if not image_processor.do_center_crop:
        return None
    shortest = image_processor.size.get("shortest_edge")
    if image_processor.do_resize and shortest is None:
        resized_width, resized_height = image_processor.size["width"], image_processor.size["height"]
    elif image_processor.do_resize:
        resized_width, resized_height = (int(shortest * extent / min(image_size)) for extent in image_size)
    else:
        resized_width, resized_height = image_size
    crop_width, crop_height = image_processor.crop_size["width"], image_processor.crop_size["height"]
    left, top = (resized_width - crop_width) // 2, (resized_height - crop_height) // 2
    across, down = width / resized_width, height / resized_height
    return left * across, top * down, (left + crop_width) * across, (top + crop_height) * down


LLAVA = Llava()

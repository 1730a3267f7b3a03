"""A `Qwen2VLProcessor` for installations without torchvision.

transformers' own class asks for a video processor, and that one imports torchvision at its top, so without
torchvision not even still images can be processed. The class here has the same name and the same saved form, but no
video processor: its folders load with plain `AutoProcessor` where torchvision is present, and the folders that
transformers saves (with a video processor) load here.
"""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_vl import processing_qwen2_vl as stock
from transformers.processing_utils import ProcessorMixin

from sparsemm.errors import DataError

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"

# What a video processor shares with the image processor beside it; the rest are its own defaults.
_SHARED_WITH_IMAGE_PROCESSOR = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
    "temporal_patch_size",
)


class Qwen2VLProcessor(stock.Qwen2VLProcessor):
    """Image processor and tokenizer of Qwen2-VL, without a video processor (still images only).

    Raises `DataError` when videos are passed in.
    """

    # The parameter names are read by transformers: they decide which sub-processors a folder is searched for.
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.video_token = getattr(tokenizer, "video_token", None) or VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # A folder saved with torchvision may hand its video processor's settings in; they are written again by to_dict.
        kwargs.pop("video_processor", None)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As the stock processor: a `BatchFeature` with `input_ids`, `attention_mask`, `mm_token_type_ids`
        (each `[batch, seq_len]`), `pixel_values` `[patches, patch_dim]` and `image_grid_thw` `[images, 3]`."""
        if videos is not None:
            raise DataError(
                "this processor reads still images only; install torchvision and the [qwen] extra for videos"
            )
        return super().__call__(images=images, text=text, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The saved form, with the `video_processor` entry that `AutoProcessor` needs where torchvision is present."""
        output = super().to_dict()
        image_settings = output.get("image_processor") or {}
        video_settings = {key: image_settings[key] for key in _SHARED_WITH_IMAGE_PROCESSOR if key in image_settings}
        if "size" in image_settings:
            video_settings["size"] = dict(image_settings["size"])
        video_settings["video_processor_type"] = "Qwen2VLVideoProcessor"
        output["video_processor"] = video_settings
        return output

"""Processors: padding on the left, resizing with Pillow, and what works without torchvision.

The processors of many families ask for a video processor, and those import torchvision, so that without it not even
still images can be processed. `still_images` makes of such a class one with the same name, behaviour and saved form but
no video processor: what it saves loads with plain `AutoProcessor` where torchvision is present, and the folders that
transformers saves (with a video processor) load with it.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

from transformers.processing_utils import ProcessorMixin

from sparsemm.errors import DataError

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
    "size",
    "temporal_patch_size",
)


class TextProcessor(ProcessorMixin):
    """A tokenizer where a processor is asked for."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)


class _WithoutVideo(ProcessorMixin):
    """Stands behind a stock processor class in the order of its bases, and takes its video processor away."""

    video_processor = SimpleNamespace(num_frames=None, fps=None)  # some ask for these, with or without a video

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, video_processor: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=kwargs.get("chat_template"))

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # transformers would read the names of settings off the code of __init__, where a wrapper has none.
        return_unused = kwargs.pop("return_unused_kwargs", False)
        settings = {**processor_dict, **kwargs}
        known = set(inspect.signature(cls.__init__).parameters) - set(cls.get_attributes())
        processor = cls(*args, **{name: value for name, value in settings.items() if name in known})
        unused = {name: value for name, value in settings.items() if name not in known}
        return (processor, unused) if return_unused else processor


@functools.cache
def still_images(name: str, video_class: str | None = None) -> type[ProcessorMixin]:
    """The processor class `name` of transformers; where it wants torchvision for videos, one for still images only.

    `video_class` is the name of its video processor, where that is not the processor's with "Video" in it.

    Raises `DataError` when videos are passed in.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    stock: type[ProcessorMixin] = getattr(transformers, name)
    signature = inspect.signature(stock.__init__)
    if is_torchvision_available() or "video_processor" not in signature.parameters:
        return stock
    video_class = video_class or name.replace("Processor", "VideoProcessor")

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):  # noqa: N807
        # A folder saved with torchvision may hand its video processor's settings in; they are written again by to_dict.
        kwargs["video_processor"] = None
        stock.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    # transformers reads the names of the parameters: which sub-processors a folder is searched for, what is saved.
    kept = [each for each in signature.parameters.values() if each.name != "video_processor"]
    __init__.__signature__ = signature.replace(parameters=kept)

    def __call__(self, images=None, text=None, videos=None, **kwargs):  # noqa: N807
        if videos is not None:
            raise DataError("this processor reads still images only; install torchvision for videos")
        return stock.__call__(self, images=images, text=text, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The saved form, with the `video_processor` entry that `AutoProcessor` needs where torchvision is present."""
        output = stock.to_dict(self)
        settings = output.get("image_processor") or {}
        shared = {key: settings[key] for key in _SHARED_WITH_IMAGE_PROCESSOR if key in settings}
        return {**output, "video_processor": {**shared, "video_processor_type": video_class}}

    members = {"__init__": __init__, "__call__": __call__, "to_dict": to_dict, "__module__": stock.__module__}
    return type(name, (stock, _WithoutVideo), {**members, "__doc__": stock.__doc__})


def use_pillow(processor: ProcessorMixin, path: str) -> ProcessorMixin:
    """Resize images with Pillow where torchvision is present too: the two differ, and so would results."""
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    return processor


def pad_left(processor: ProcessorMixin) -> ProcessorMixin:
    """Set the tokenizer to pad on the left, with the end-of-text token where the checkpoint names no padding."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor

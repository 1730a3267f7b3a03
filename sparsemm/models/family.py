"""What every model family offers, and the parts of it that do not differ between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsemm.errors import ConfigError, DataError
from sparsemm.models.geometry import ImageLayout, Inputs, split_images_by_row
from sparsemm.models.images import open_image
from sparsemm.models.messages import Messages, is_conversation, media_items, render, source_of

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PretrainedConfig, ProcessorMixin

_KNOWN_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Buffers that old checkpoints hold and models compute."""


class ModelFamily:
    """Loading, prompts and image-token geometry of one model class. Stateless: one instance serves every model."""

    name: str
    """As in result files: the `model_type` of the configuration."""
    model_class: str
    """Name of the one transformers class that is supported."""
    processor_class: str
    """Name of its processor class in transformers."""
    image_tokens: str
    """How an image becomes tokens, in words."""
    video_processor_class: str | None = None
    """Name of the class beside it for videos, where that is not told by its own."""
    needs: str = ""
    """The package that its processor needs beside this one's own."""
    nested_images: bool = False
    """Whether the processor wants a list of images for each prompt, instead of all in one."""
    pads_grid: bool = False
    """Whether the outermost cells of a grid may hold padding: `image_token_layout` takes `exact_grid` then."""

    # -- models -------------------------------------------------------------------------------------------------------

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder stack (`layers`, `embed_tokens`, `norm`) inside `model`."""
        return model.model.language_model

    def load_weights(self, path: str, **kwargs: Any) -> nn.Module:
        """The model class's `from_pretrained`, safetensors only.

        Raises:
            DataError: Weights are missing, left over, of another shape, or their file is broken: transformers would
                fill in random ones.
        """
        import transformers
        from safetensors import SafetensorError

        model_class = getattr(transformers, self.model_class)
        try:
            model, report = model_class.from_pretrained(
                path,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported, and refused below
                **kwargs,
            )
        except (RuntimeError, SafetensorError) as error:
            raise DataError(f"the weights in {path} do not fit its config.json, or are damaged: {error}") from error
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            found = (key if isinstance(key, str) else key[0] for key in report.get(kind) or ())
            keys = sorted(key for key in found if not key.endswith(_KNOWN_BUFFERS))
            if keys:
                raise DataError(
                    f"the weights in {path} do not fit its config.json: {len(keys)} {kind.replace('_', ' ')}, such as "
                    f"{', '.join(keys[:3])}; get the whole checkpoint again, or the configuration it belongs to"
                )
        return model

    # -- processors and prompts ---------------------------------------------------------------------------------------

    def load_processor(
        self, path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorMixin:
        """The processor of a checkpoint folder or hub id, padding on the left."""
        from sparsemm.models.processing import pad_left, still_images, use_pillow

        refuse_pixel_limits(self.name, min_pixels, max_pixels)
        stills = still_images(self.processor_class, self.video_processor_class)
        return pad_left(use_pillow(stills.from_pretrained(path, trust_remote_code=False), path))

    def largest_picture(self, config: PretrainedConfig, processor: ProcessorMixin) -> int | None:
        """Pixels of the largest picture that the model sees undiminished; None where the family does not say."""
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        return max(height * width for height, width in pinpoints) if pinpoints else None

    def build_inputs(
        self,
        processor: ProcessorMixin,
        images: Sequence[Any] | None,
        prompts: str | Messages | Sequence[str | Messages],
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Model inputs of a batch, through the chat template, padded on the left.

        Args:
            processor: From `load_processor` (or `load_model`).
            images: One entry per prompt: a `PIL.Image.Image`, a path, a list of either, or None for no image. None for
                a batch whose images, if any, stand in messages.
            prompts: One prompt, or one per row: the user's text, or a conversation as chat-template messages whose
                images are `PIL.Image.Image`s, paths or base64 data URIs.
            device: Where the tensors go; the CPU by default.

        Returns:
            `input_ids`, `attention_mask` int64 `[batch, seq_len]`, `pixel_values`, and what the family's model needs.

        Raises:
            DataError: An image cannot be read or is of a shape that the processor refuses, their number differs from
                the prompts' or from the image tokens in them, or there is no chat template.
        """
        prompts = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else list(prompts)
        if images is None:
            images = [None] * len(prompts)
        elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            images = [images]
        if len(images) != len(prompts):
            raise DataError(
                f"{len(images)} image entries for {len(prompts)} prompts; give one per prompt (None for none)"
            )
        texts: list[str] = []
        media: dict[str, list[Any]] = {"images": [], "videos": []}
        for entry, prompt in zip(images, prompts, strict=True):
            conversation, found = self._conversation(entry, prompt)
            texts.append(render(processor, conversation))
            for kind, values in found.items():
                media[kind].extend([values] if self.nested_images else values)
        bos = processor.tokenizer.bos_token
        try:
            inputs = processor(
                **{kind: values for kind, values in media.items() if any(values)},
                text=texts,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                # A template that writes the beginning-of-text token itself must not get a second one.
                add_special_tokens=not (bos and all(text.startswith(bos) for text in texts)),
                **self.call_options(processor),
            )
        except ValueError as error:  # an image too narrow for its patches, an image token in a prompt
            raise DataError(f"the processor takes no such images and prompts ({error}); change them") from error
        inputs = self.finish_inputs(processor, inputs)
        return inputs if device is None else inputs.to(device)

    def call_options(self, processor: ProcessorMixin) -> dict[str, Any]:
        """Hook: what only this family's processor is told beside images and text."""
        return {}

    def finish_inputs(self, processor: ProcessorMixin, inputs: BatchFeature) -> BatchFeature:
        """Hook: entries that only this family's model needs."""
        return inputs

    def read_media(self, conversation: Messages) -> dict[str, list[Any]]:
        """The "images" (and "videos") of a conversation in order, ready for the processor.

        Raises `DataError` for an image that cannot be read, and for a video.
        """
        images = []
        for item in media_items(conversation):
            if item.get("type") == "video":
                raise DataError(f"{self.name} prompts take still images only; remove the video from the messages")
            images.append(open_image(source_of(item)))
        return {"images": images}

    def _conversation(self, entry: Any, prompt: str | Messages) -> tuple[Messages, dict[str, list[Any]]]:
        entries = [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]
        if isinstance(prompt, str):
            opened = [open_image(source) for source in entries]
            content: list[dict[str, Any]] = [{"type": "image"} for _ in opened]
            return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}], {"images": opened}
        if not is_conversation(prompt):
            raise DataError(f"a prompt is text or a list of messages with 'role' and 'content', got {prompt!r}")
        if not entries:
            return prompt, self.read_media(prompt)
        places = sum(1 for _ in media_items(prompt))
        if places != len(entries):
            raise DataError(f"the messages hold {places} image places, {len(entries)} images were given beside them")
        return prompt, {"images": [open_image(source) for source in entries]}

    # -- geometry -----------------------------------------------------------------------------------------------------

    def image_layouts(
        self,
        config: PretrainedConfig,
        inputs: Inputs,
        *,
        processor: ProcessorMixin | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[ImageLayout]:
        """The layout of every image of a batch, in order, `columns` still counted from each image's first token.

        Raises `DataError` where it depends on how the processor cut the images, and `processor` or `image_sizes` are
        not given.
        """
        if "pixel_values" not in inputs:
            return []
        if processor is None or image_sizes is None:
            raise DataError(
                f"where the image tokens of {self.name} lie depends on how its processor cut the images: give "
                "processor and image_sizes (original width and height of every image)"
            )
        return [self.image_layout(config, inputs, processor, size) for size in image_sizes]

    def image_layout(
        self, config: PretrainedConfig, inputs: Inputs, processor: ProcessorMixin, image_size: tuple[int, int]
    ) -> ImageLayout:
        """The layout of one image of original (width, height), for families whose inputs do not tell it."""
        raise NotImplementedError(f"{type(self).__name__} says neither image_layout nor image_layouts")

    def exact_layouts(
        self, config: PretrainedConfig, inputs: Inputs, layouts: Sequence[ImageLayout]
    ) -> list[ImageLayout]:
        """The layouts, their grids over the very pixels that they show; a family that says `pads_grid` has its own."""
        return list(layouts)

    def random_image(self, config: PretrainedConfig, dtype: torch.dtype, limit: int) -> dict[str, Tensor]:
        """Inputs of one random image of at most about `limit` tokens, for benchmarks; empty where none is needed."""
        return {}

    def image_token_layout(
        self,
        config: PretrainedConfig,
        inputs: Inputs,
        *,
        processor: ProcessorMixin | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        exact_grid: bool = False,
    ) -> list[list[ImageLayout]]:
        """The images of each row of a batch: which token of `input_ids` shows which cell of which image.

        Args:
            config: The model's configuration.
            inputs: From `build_inputs` (or the processor itself).
            processor: That made `inputs`; needed where the processor crops images or cuts them into tiles.
            image_sizes: Original (width, height) of every image, in order; needed there, too.
            exact_grid: Whether a grid whose outermost cells hold padding, or miss pixels, covers just what it shows
                instead of the whole image (as in spec section 5); for families that say `pads_grid`.

        Raises:
            DataError: The image tokens do not fit the images, or the family needs `processor` and `image_sizes`.
        """
        from dataclasses import replace

        input_ids = inputs["input_ids"]
        layouts = self.image_layouts(config, inputs, processor=processor, image_sizes=image_sizes)
        if exact_grid:
            layouts = self.exact_layouts(config, inputs, layouts)
        counts = [len(layout) for layout in layouts]
        rows = []
        for row, indices in enumerate(split_images_by_row(input_ids, config.image_token_id, counts)):
            columns = (input_ids[row] == config.image_token_id).nonzero().flatten().cpu()
            pieces = columns.split([counts[index] for index in indices]) if indices else ()
            rows.append([replace(layouts[index], columns=piece) for index, piece in zip(indices, pieces, strict=True)])
        return rows


def refuse_pixel_limits(name: str, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raise `ConfigError` when limits are given to a family whose image sizes are fixed by its checkpoint."""
    if min_pixels is not None or max_pixels is not None:
        raise ConfigError(
            f"min_pixels={min_pixels} and max_pixels={max_pixels} have no meaning for {name}, whose images have fixed "
            "sizes; leave them out"
        )

"""Which prompt positions each kv head keeps of a real prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

import sparsemm
from sparsemm.chase import READ_PROMPT
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.methods import get_method
from sparsemm.models import family_of
from sparsemm.models.geometry import ImageLayout
from sparsemm.models.images import open_image
from sparsemm.viz.reading import cached_keys

if TYPE_CHECKING:
    import PIL.Image
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm.cache import SparseLayer


@dataclass(frozen=True)
class KeptRows:
    """What a method keeps of one prompt.

    Attributes:
        image: The page in RGB.
        layout: The image's tokens among the prompt's columns.
        positions: Per layer, per kv head: sorted columns of the prompt.
        prompt_length: Columns of the prompt.
        config: The method and its settings.
    """

    image: PIL.Image.Image
    layout: ImageLayout
    positions: list[list[LongTensor]]
    prompt_length: int
    config: CompressionConfig

    def on_image(self, layer: int, head: int) -> Tensor:
        """Bool `[num_image_tokens]`: which of the image's tokens, in the layout's order, a kv head keeps."""
        kept = torch.zeros(self.prompt_length, dtype=torch.bool)
        kept[self.positions[layer][head]] = True
        return kept[self.layout.columns]

    def rows(self) -> Tensor:
        """int64 `[num_layers, num_kv_heads]`: how many rows each kv head keeps."""
        return torch.tensor([[len(positions) for positions in heads] for heads in self.positions])

    def describe(self) -> str:
        """Method, budget and prompt in one line."""
        return (
            f"{self.config.method}, budget {self.config.budget} of {self.prompt_length} prompt rows "
            f"({float(self.rows().double().mean()):.2f} kept per kv head)"
        )


def kept_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Any,
    config: CompressionConfig,
    *,
    prompt: str = READ_PROMPT,
) -> KeptRows:
    """The positions that `config` keeps of the prompt with `image`, chosen from its own queries and keys.

    Raises:
        ConfigError: The method keeps every row.
        DataError: The image cannot be read.
    """
    if not get_method(config.method).compresses:
        raise ConfigError(f"method={config.method!r} keeps every row; choose one that compresses")
    family = family_of(model)
    picture = open_image(image)
    inputs = family.build_inputs(processor, [picture], [prompt], device=model.device)
    (layout,) = family.image_token_layout(model.config, inputs, processor=processor, image_sizes=[picture.size])[0]
    num_layers = family.text_model(model).config.num_hidden_layers
    positions: list[list[LongTensor]] = []

    def observe(layer_idx: int, query: Tensor, layer: SparseLayer) -> None:
        key = cached_keys(layer)[None]
        (heads,) = sparsemm.select_positions(query, key, config, layer_idx=layer_idx, num_layers=num_layers)
        positions.append([head.cpu() for head in heads])

    everything = CompressionConfig(method="fullkv", budget=None)
    with sparsemm.patch(model, everything, reserve=1) as handle, torch.inference_mode():
        handle.observer = observe
        model(**inputs, logits_to_keep=1)
    return KeptRows(picture, layout, positions, inputs["input_ids"].shape[1], config)

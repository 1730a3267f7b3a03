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
from sparsemm.models.geometry import ImageLayout
from sparsemm.runs.plots import LABELS
from sparsemm.viz.reading import attention_scaling, cached_keys, watch_reading

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
        name, mean = LABELS.get(self.config.method, self.config.method), float(self.rows().double().mean())
        return f"{name}, budget {self.config.budget} of {self.prompt_length} prompt rows ({mean:.2f} kept per kv head)"


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
    scaling = attention_scaling(model)
    positions: list[list[LongTensor]] = []

    def observe(layer_idx: int, query: Tensor, layer: SparseLayer) -> None:
        key = cached_keys(layer)[None]
        (heads,) = sparsemm.select_positions(
            query, key, config, layer_idx=layer_idx, num_layers=len(scaling), scaling=scaling[layer_idx]
        )
        positions.append([head.cpu() for head in heads])

    picture, layout, _, columns, _ = watch_reading(model, processor, image, prompt, 1, lambda layout: observe)
    return KeptRows(picture, layout, positions, len(columns), config)

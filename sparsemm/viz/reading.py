"""What heads look at while a model reads: attention over the image tokens, for every generated token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

import sparsemm
from sparsemm.chase import READ_PROMPT
from sparsemm.chase.matching import token_texts
from sparsemm.config import CompressionConfig
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.models.geometry import ImageLayout, Region
from sparsemm.models.images import open_image
from sparsemm.models.layers import ragged_layers

if TYPE_CHECKING:
    import PIL.Image
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm.cache import SparseLayer
    from sparsemm.head_scores import HeadScores

Head = tuple[int, int]
"""(layer, query head)."""


@dataclass(frozen=True)
class Reading:
    """A page as read by a model, and where some of its heads looked.

    Attributes:
        image: The page in RGB.
        prompt: What was asked.
        tokens: Text of each generated token; special tokens as `<name>`.
        heads: (layer, query head) of each column of `weights`.
        weights: float32 `[num_tokens, num_heads, num_image_tokens]` on the CPU: attention weights of the row that
            predicts the token. What is left to 1 goes to text.
        layout: The image's tokens; `weights[..., i]` belongs to token i of it.
    """

    image: PIL.Image.Image
    prompt: str
    tokens: list[str]
    heads: list[Head]
    weights: Tensor
    layout: ImageLayout

    @property
    def text(self) -> str:
        """All that was read, special tokens left out."""
        return "".join(token for token in self.tokens if not token.startswith("<"))

    def of_heads(self, heads: Sequence[Head]) -> Reading:
        """The same reading with these of its heads, in this order."""
        places = [self.heads.index(head) for head in heads]
        return dataclasses.replace(self, heads=list(heads), weights=self.weights[:, places])

    def part_map(self, token: int | None, head: int, part: str | None = None) -> Tensor:
        """Attention of one head over one part of the image: float32 `[rows, columns]`.

        Args:
            token: Index in `tokens`; None is the mean over all of them.
            head: Index in `heads`.
            part: One of `layout.grids`; the layout's main part by default. Newline tokens are in none.

        Raises:
            DataError: There is no such part.
        """
        weights = self.weights[:, head].mean(0) if token is None else self.weights[token, head]
        return grid_map(self.layout, weights, part)

    def region(self, part: str | None = None) -> Region:
        """The pixels of the image that a part's grid covers; the main part's by default."""
        return part_region(self.layout, self.image.size, part)


def grid_map(layout: ImageLayout, values: Tensor, part: str | None = None) -> Tensor:
    """One value per image token, `[num_image_tokens]`, as the grid of a part of the image: float32 `[rows, columns]`.

    Frames of a video are summed. Raises `DataError` when the layout has no such part.
    """
    part = layout.main_part if part is None else part
    if part not in layout.grids:
        raise DataError(f"no image part {part!r}; this layout has {', '.join(layout.grids)}")
    inside = torch.tensor([name == part for name in layout.parts])
    grid = torch.zeros(layout.grids[part])
    return grid.index_put((layout.rows[inside], layout.cols[inside]), values[inside].float().cpu(), accumulate=True)


def part_region(layout: ImageLayout, image_size: tuple[int, int], part: str | None = None) -> Region:
    """(left, top, right, bottom) of what a part's grid covers, the main part by default; the whole image as a rule."""
    return layout.regions.get(layout.main_part if part is None else part, (0.0, 0.0, *map(float, image_size)))


class AttentionRows:
    """An attention observer that keeps, for some heads, the row that predicts each token over the image's columns.

    Args:
        heads: (layer, query head) pairs.
        columns: Columns of the image tokens in the prompt.
        scaling: Factor of the logits of each layer, from `attention_scaling`.
    """

    def __init__(self, heads: Sequence[Head], columns: Tensor, scaling: Sequence[float]) -> None:
        self._scaling = scaling
        self._columns = columns
        self._places: dict[int, list[tuple[int, int]]] = {}
        for place, (layer, head) in enumerate(heads):
            self._places.setdefault(layer, []).append((head, place))
        self._rows: list[list[Tensor]] = [[] for _ in heads]

    def __call__(self, layer_idx: int, query: Tensor, layer: SparseLayer) -> None:
        """query `[1, num_query_heads, n, head_dim]` after RoPE; the layer keeps every row."""
        if layer_idx not in self._places:
            return
        key = cached_keys(layer)
        heads = torch.tensor([head for head, _ in self._places[layer_idx]], device=query.device)
        group = query.shape[1] // key.shape[0]
        logits = torch.einsum("hd,hkd->hk", query[0, heads, -1].float(), key[heads // group].float())
        weights = (logits * self._scaling[layer_idx]).softmax(-1)[:, self._columns.to(query.device)]
        for (_, place), row in zip(self._places[layer_idx], weights, strict=True):
            self._rows[place].append(row)

    def result(self) -> Tensor:
        """float32 `[num_tokens, num_heads, num_image_tokens]` on the CPU."""
        return torch.stack([torch.stack(rows).cpu() for rows in self._rows], dim=1)


def attention_scaling(model: PreTrainedModel) -> list[float]:
    """The factor of the attention logits of each layer with ragged rows, head_dim ** -0.5 as a rule."""
    text_model = family_of(model).text_model(model)
    return [text_model.layers[index].self_attn.scaling for index in ragged_layers(text_model.config)]


def cached_keys(layer: SparseLayer) -> Tensor:
    """The keys of a batch of one in a cache that keeps all rows, of all heads: `[num_kv_heads, length, head_dim]`."""
    # Under fullkv every list has the same length, and begins at a multiple of the same capacity.
    capacity = int(layer.offsets[1])
    lists = layer.key_buffer[: capacity * (len(layer.offsets) - 1)].view(-1, capacity, layer.key_buffer.shape[-1])
    return layer.plan.parallel.gather(lists[:, : layer.seen], dim=0)


def choose_heads(
    scores: HeadScores | None, shape: tuple[int, int], *, names: Sequence[str] = (), top: int = 0, bottom: int = 0
) -> list[Head]:
    """Heads by name ("2-5" is head 5 of layer 2), then those with the highest and with the lowest scores.

    Raises:
        ConfigError: A name is none of the model, scores are needed and missing, or no head is chosen.
    """
    heads: list[Head] = []
    for name in names:
        layer, _, head = name.partition("-")
        if not (layer.isdigit() and head.isdigit() and int(layer) < shape[0] and int(head) < shape[1]):
            raise ConfigError(f"head {name!r} is not layer-head, from 0-0 to {shape[0] - 1}-{shape[1] - 1}")
        heads.append((int(layer), int(head)))
    if top or bottom:
        if scores is None:
            raise ConfigError("the heads with the highest or lowest scores need head scores; give --head-scores")
        scores.check_shape(*shape)
        order = scores.values.flatten().argsort(descending=True, stable=True).tolist()
        chosen = order[:top] + (order[-bottom:] if bottom else [])
        heads += [divmod(index, shape[1]) for index in chosen]
    if not heads:
        raise ConfigError("no head is chosen; name some, or ask for the top or bottom ones")
    return list(dict.fromkeys(heads))


def watch_reading(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Any,
    prompt: str,
    max_new_tokens: int,
    watch: Callable[[ImageLayout], Any],
) -> tuple[PIL.Image.Image, ImageLayout, Any, LongTensor, LongTensor]:
    """Let the model read an image greedily with the full cache, seen by the attention observer `watch(layout)`.

    Returns:
        The image in RGB, its tokens, the observer, and the columns of the prompt and of what was generated.
    """
    family = family_of(model)
    picture = open_image(image)
    inputs = family.build_inputs(processor, [picture], [prompt], device=model.device)
    (layout,) = family.image_token_layout(model.config, inputs, processor=processor, image_sizes=[picture.size])[0]
    observer = watch(layout)
    config = CompressionConfig(method="fullkv", budget=None)
    with sparsemm.patch(model, config, reserve=max_new_tokens) as handle, torch.inference_mode():
        gather = handle.plan.parallel.gather
        handle.observer = lambda layer_idx, query, layer: observer(layer_idx, gather(query, dim=1), layer)
        generated, _ = generate_greedy(model, inputs, max_new_tokens)
    return picture, layout, observer, inputs["input_ids"][0], generated[0]


def read_with_attention(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Any,
    heads: Sequence[Head],
    *,
    prompt: str = READ_PROMPT,
    max_new_tokens: int = 64,
) -> Reading:
    """Let the model read `image` greedily, with the attention of `heads` over its tokens.

    Args:
        model, processor: From `sparsemm.load_model`; the model is patched meanwhile (full cache).
        image: A `PIL.Image.Image` or a path.
        heads: (layer, query head) pairs; memory is tokens x heads x image tokens x 4 bytes.
        prompt: What the model is asked.
        max_new_tokens: At most so many tokens are read.

    Raises:
        DataError: The image cannot be read.
    """
    scaling = attention_scaling(model)
    picture, layout, observer, _, generated = watch_reading(
        model, processor, image, prompt, max_new_tokens, lambda layout: AttentionRows(heads, layout.columns, scaling)
    )
    ids = generated.tolist()
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    texts = token_texts(processor.tokenizer, ids)
    special = set(processor.tokenizer.all_special_ids)
    tokens = [
        f"<{name.strip('<>|')}>" if index in special else text
        for index, name, text in zip(ids, names, texts, strict=True)
    ]
    return Reading(picture, prompt, tokens, list(heads), observer.result(), layout)

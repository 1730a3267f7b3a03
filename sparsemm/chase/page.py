"""What one page gives: the model reads it, and each head's largest attention weight is looked up (spec section 5)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparsemm.chase.matching import can_match, match_aligned, normalise, token_texts
from sparsemm.config import CompressionConfig
from sparsemm.decoding.generation import stock_greedy
from sparsemm.documents.pages import TextBox, sound_words
from sparsemm.errors import DataError, SparseMMError
from sparsemm.models import family_of
from sparsemm.models.images import open_image
from sparsemm.models.layers import ragged_layers
from sparsemm.models.parallel import tensor_parallel_of
from sparsemm.patching import patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

logger = logging.getLogger(__name__)

_TILE = 64
"""Generated tokens whose attention is looked up together: their logits, not the prompt's, exist for a moment."""

READ_PROMPT = "Provide all the OCR results of this image."


class Page(Protocol):
    """A document image (what `open_image` takes) with its text chunks in reading order.

    Boxes are the pixels (x0, y0, x1, y1) of the first and last ink, both included.
    """

    image: Any
    words: Sequence[TextBox]


class TopColumns:
    """An attention observer that notes, for each generated token, the column every head looks at most.

    The row is the one that predicts the token: in the forward that produces it, that of the last query. Queries are
    collected and looked up `_TILE` tokens at a time, in one product a layer; only the arg max is kept, on the device.
    Nothing is copied to the host until `result`.
    """

    def __init__(self, num_layers: int) -> None:
        self._waiting: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._columns: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._layers: list[Any] = [None] * num_layers

    def __call__(self, layer_idx: int, query: Tensor, layer: Any) -> None:
        """query `[1, num_query_heads, n, head_dim]` after RoPE; the layer keeps every row."""
        # Of a prompt only the last query is wanted: a view would keep all of them alive.
        self._waiting[layer_idx].append(query[:, :, -1:].clone() if query.shape[2] > 1 else query)
        self._layers[layer_idx] = layer
        if len(self._waiting[layer_idx]) == _TILE:
            self._look_up(layer_idx)

    def _look_up(self, layer_idx: int) -> None:
        waiting = self._waiting[layer_idx]
        if waiting:
            columns = self._layers[layer_idx].top_columns(torch.cat(waiting, dim=2))
            self._columns[layer_idx].append(columns[0].T)
            waiting.clear()

    def result(self) -> Tensor:
        """int64 `[num_tokens, num_layers, num_query_heads]`, on the first layer's device."""
        for layer_idx in range(len(self._layers)):
            self._look_up(layer_idx)
        device = self._columns[0][0].device
        return torch.stack([torch.cat(columns).to(device) for columns in self._columns], dim=1)


def read_page(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, max_new_tokens: int, **generate: Any
) -> tuple[list[int], Tensor]:
    """Generate greedily from one prompt, with the columns that the heads look at.

    Args:
        inputs: Of one unpadded prompt.

    Returns:
        The new token ids, and int64 `[num_new_tokens, num_layers, num_query_heads]`: the column (of the prompt, then of
        the generated tokens) with each head's largest attention weight in the row that predicts the token.
    """
    observer = TopColumns(len(ragged_layers(family_of(model).text_model(model).config)))
    with patch(model, CompressionConfig(method="fullkv", budget=None), reserve=max_new_tokens) as handle:
        handle.observer = observer
        tokens, _ = stock_greedy(model, inputs, max_new_tokens, **generate)
        return tokens[0].tolist(), handle.plan.parallel.gather(observer.result(), dim=2)


def count_hits(
    columns: Tensor, chunk_of_token: Sequence[int | None], boxes: dict[int, Tensor], num_columns: int
) -> dict[int, Tensor]:
    """How often each head looked into the box of the chunk being read.

    Args:
        columns: From `read_page`, `[num_tokens, num_layers, num_query_heads]`.
        chunk_of_token: For each token the chunk it matched, or None.
        boxes: Columns of the image tokens of each matched chunk.
        num_columns: Length of the context, prompt and generated tokens.

    Returns:
        For each matched chunk, int64 `[num_layers, num_query_heads]` on the CPU: its tokens that the head hit.
    """
    chunks = sorted(boxes)
    if not chunks:
        return {}
    inside = torch.zeros(len(chunks), num_columns, dtype=torch.bool)
    for row, chunk in enumerate(chunks):
        inside[row, boxes[chunk]] = True
    tokens = [index for index, chunk in enumerate(chunk_of_token) if chunk is not None]
    rows = torch.tensor([chunks.index(chunk_of_token[index]) for index in tokens], device=columns.device)
    looked = columns[torch.tensor(tokens, device=columns.device)]
    hit = inside.to(columns.device)[rows[:, None, None], looked].long()
    counts = torch.zeros(len(chunks), *looked.shape[1:], dtype=torch.long, device=columns.device)
    counts.index_add_(0, rows, hit)
    return dict(zip(chunks, counts.cpu(), strict=True))


def chase_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    page: Page,
    find_chunks: Any,
    *,
    prompt: str,
    part: str | None,
    max_new_tokens: int,
    exact_grid: bool = False,
) -> dict[str, Any]:
    """What one page gives, as JSON values.

    `text`, numbers of `tokens`, of those that hold a letter or digit (`matchable`), of these that the aligned rule
    finds on the page (`read`), that the match rule finds in an image token (`matched`), and of `hits`; whether the
    reading was `cut` off; words by what is wrong with them (`flaws`); `scores` as (layer, head, score).

    A page that cannot be read, or holds no words, gives its reason as `skipped`, and is not read. `find_chunks` is a
    match rule's function.
    """
    from PIL import Image

    family = family_of(model)
    positions = family.text_model(model).config.max_position_embeddings
    flaw = None
    try:
        image = open_image(page.image)
        words, flaws = sound_words(page.words, image.size)
        if not words:
            raise DataError("it holds no words")
        inputs = family.build_inputs(processor, [image], [prompt], device=model.device)
        ((layout,),) = family.image_token_layout(
            model.config, inputs, processor=processor, image_sizes=[image.size], exact_grid=exact_grid
        )
        regions = [layout.tokens_in_box(word.box, image.size, part=part) for word in words]
        length = inputs["input_ids"].shape[1]
        if length >= positions:
            raise DataError(f"its prompt of {length} tokens leaves none of the model's {positions} positions to read")
    except (SparseMMError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # What broken images and odd sizes raise.
        flaw = str(error)
    flaw = tensor_parallel_of(model).first_of(flaw)  # none reads what another process cannot
    if flaw is not None:
        logger.warning("page %s skipped: %s", getattr(page, "name", ""), flaw)
        return {"skipped": flaw}
    most = min(max_new_tokens, positions - length)
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    token_ids, columns = read_page(model, inputs, max_new_tokens=most)
    texts, chunks = token_texts(processor.tokenizer, token_ids), [word.text for word in words]
    found = find_chunks(texts, chunks)
    read = found if find_chunks is match_aligned else match_aligned(texts, chunks)
    chunk_of_token = [None if chunk is None or not len(regions[chunk]) else chunk for chunk in found]
    boxes = {chunk: regions[chunk] for chunk in chunk_of_token if chunk is not None}
    counts = count_hits(columns, chunk_of_token, boxes, length + len(token_ids))
    total = torch.zeros(columns.shape[1:], dtype=torch.float64)
    for chunk, count in counts.items():
        total += count.double() / len(boxes[chunk])
    if without := sum(not len(region) for region in regions):
        flaws["no image token"] = without
    return {
        "text": "".join(texts),
        "tokens": len(token_ids),
        "matchable": sum(can_match(normalise(text)) for text in texts),
        "read": sum(chunk is not None for chunk in read),
        "matched": sum(chunk is not None for chunk in chunk_of_token),
        "hits": sum(int(count.sum()) for count in counts.values()),
        "cut": len(token_ids) == most and token_ids[-1] not in ends,
        "flaws": dict(flaws),
        "scores": [[layer, head, float(total[layer, head])] for layer, head in total.nonzero().tolist()],
    }

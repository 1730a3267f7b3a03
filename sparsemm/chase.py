"""Chasing visual heads: which query heads look at the text that the model is reading (spec section 5)."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, DataError, SparseMMError
from sparsemm.head_scores import HeadScores
from sparsemm.journal import Journal, remove_journal
from sparsemm.matching import match_rule, token_texts
from sparsemm.models import family_of
from sparsemm.models.family import open_image
from sparsemm.parallel import Workers, workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

logger = logging.getLogger(__name__)

_TILE = 64
"""Generated tokens whose attention is looked up together: their logits, not the prompt's, exist for a moment."""

READ_PROMPT = "Provide all the OCR results of this image."


class TextBox(Protocol):
    """A chunk of a page's text and the pixels (x0, y0, x1, y1) it covers, both corners included."""

    text: str
    box: Sequence[float]


class Page(Protocol):
    """A document image (a `PIL.Image.Image`, or a path) with its text chunks in reading order."""

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


def chase(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Iterable[Page],
    *,
    match: str = "unique",
    max_new_tokens: int = 1024,
    prompt: str = READ_PROMPT,
    part: str | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    model_name: str | None = None,
    dataset: str | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every query head by how often it looks at the text being read (spec section 5).

    For each page the model reads greedily. A generated token that belongs to one chunk gives 1/|I| to every head whose
    largest attention weight, in the row that predicts the token, falls among the |I| image tokens of the chunk's box.
    Sums are averaged over the images and normalised to 1.

    Under `accelerate launch` (or torchrun) the processes share the pages; the result is that of one process.

    Args:
        model, processor: From `load_model`; the model is patched meanwhile (full cache) and restored afterwards.
        pages: Pages in a fixed order. An image that cannot be read is logged, skipped and counted.
        match: "unique" (the paper's) or "aligned"; see `sparsemm.matching`.
        max_new_tokens: At most so many tokens are read from a page.
        prompt: What the model is asked.
        part: Part of the image's tokens that counts; "high_res" (LLaVA-NeXT) and "grid" (Qwen2-VL) by default.
        output: File of the result. Beside it, `<name>.images.jsonl` holds what each image gave, as soon as it is known.
        resume: Continue from that file where there is one; False starts again.
        model_name, dataset, seed: Provenance. The model's own name by default.
        progress: Show a progress bar.

    Returns:
        Scores `[num_layers, num_query_heads]`, with their provenance; saved as `output` if given.

    Raises:
        ConfigError: Unknown match rule, `max_new_tokens` below 1, or several processes and no `output`.
        DataError: The file to resume from is of another chase, or no page could be read.
        HeadScoreError: No head scored at all.
    """
    find_chunks = match_rule(match)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    family = family_of(model)
    text_config = family.text_model(model).config
    shape = (text_config.num_hidden_layers, text_config.num_attention_heads)
    settings: dict[str, Any] = {
        "model": model_name or _name_of(model),
        "weights": weights_digest(model),
        "dataset": dataset,
        "prompt": prompt,
        "match_rule": match,
        "image_part": part,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "num_kv_heads": text_config.num_key_value_heads,
        "shape": list(shape),
    }
    us = workers()
    if us.count > 1 and output is None:
        raise ConfigError("several processes bring their pages together in files; give an output")
    path = None if output is None else journal_path(output)
    if path is not None and not resume:
        if us.first:
            remove_journal(path)
        us.wait()
    journal = Journal(path, settings, part=None if us.count == 1 else us.rank)
    us.wait()  # nobody merges what another has yet to read
    count = hits = 0
    with journal, _progress(pages, us, progress) as bar:
        for index, page in _remaining(pages, journal.records, us):
            count = index + 1
            if page is not None:
                record = chase_page(
                    model, processor, page, find_chunks, prompt=prompt, part=part, max_new_tokens=max_new_tokens
                )
                journal.append(index, record)
            if us.owns(index):
                hits += journal.records[index].get("hits", 0)
                bar.set_postfix(hits=hits, refresh=False)
                bar.update()
    us.wait()
    if us.first:
        journal.merge()
    us.wait()
    journal.reread()
    scores = _collect([journal.records[index] for index in range(count)], shape, settings)
    if output is not None and us.first:
        scores.save(output)
    us.wait()
    return scores


def journal_path(output: str | os.PathLike[str]) -> Path:
    """Where `chase` keeps what each image gave, beside its `output`."""
    return Path(output).with_suffix(".images.jsonl")


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
    import sparsemm

    observer = TopColumns(family_of(model).text_model(model).config.num_hidden_layers)
    with sparsemm.patch(model, CompressionConfig(method="fullkv", budget=None), reserve=max_new_tokens) as handle:
        handle.observer = observer
        generated = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,  # settings of sampling in the checkpoint: without effect, but warned about
            top_p=None,
            top_k=None,
            **generate,
        )
    return generated[0, inputs["input_ids"].shape[1] :].tolist(), observer.result()


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


def weights_digest(model: nn.Module) -> str:
    """A digest of the first values of every parameter: tells a checkpoint from another of the same shape and name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def chase_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    page: Page,
    find_chunks: Any,
    *,
    prompt: str,
    part: str | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """What one page gives: `text`, numbers of `tokens`, `matched` tokens and `hits`, `scores` as (layer, head, score).

    A page that cannot be read gives its reason as `skipped`. `find_chunks` is a match rule's function.
    """
    from PIL import Image

    family = family_of(model)
    try:
        image = open_image(page.image)
        chunks = [word.text for word in page.words]
        inputs = family.build_inputs(processor, [image], [prompt], device=model.device)
        (layout,) = family.image_token_layout(model.config, inputs)[0]
        regions = [layout.tokens_in_box(word.box, image.size, part=part) for word in page.words]
    except (SparseMMError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # What broken images and odd sizes raise.
        logger.warning("page skipped: %s", error)
        return {"skipped": str(error)}
    token_ids, columns = read_page(model, inputs, max_new_tokens=max_new_tokens)
    texts = token_texts(processor.tokenizer, token_ids)
    chunk_of_token = find_chunks(texts, chunks)
    boxes = {chunk: regions[chunk] for chunk in chunk_of_token if chunk is not None}
    counts = count_hits(columns, chunk_of_token, boxes, inputs["input_ids"].shape[1] + len(token_ids))
    total = torch.zeros(columns.shape[1:], dtype=torch.float64)
    for chunk, count in counts.items():
        total += count.double() / len(boxes[chunk])
    return {
        "text": "".join(texts),
        "tokens": len(token_ids),
        "matched": sum(chunk is not None for chunk in chunk_of_token),
        "hits": sum(int(count.sum()) for count in counts.values()),
        "scores": [[layer, head, float(total[layer, head])] for layer, head in total.nonzero().tolist()],
    }


def _remaining(pages: Iterable[Page], done: dict[int, Any], us: Workers) -> Iterator[tuple[int, Page | None]]:
    """Every page by number, None in place of the done ones and of those of other processes.

    Pages that can be indexed are made only where they are to be read.
    """
    if isinstance(pages, Sequence):
        for index in range(len(pages)):
            yield index, None if index in done or not us.owns(index) else pages[index]
    else:
        for index, page in enumerate(pages):
            yield index, None if index in done or not us.owns(index) else page


def _collect(records: list[dict[str, Any]], shape: tuple[int, int], settings: dict[str, Any]) -> HeadScores:
    read = [record for record in records if "skipped" not in record]
    if not read:
        raise DataError(f"none of {len(records)} pages could be read; see the log for the reasons")
    total = torch.zeros(shape, dtype=torch.float64)
    for record in read:
        for layer, head, score in record["scores"]:
            total[layer, head] += score
    provenance = {
        **{key: value for key, value in settings.items() if key != "shape"},
        "num_images": len(read),
        "num_skipped": len(records) - len(read),
        "num_tokens": sum(record["tokens"] for record in read),
        "num_matched": sum(record["matched"] for record in read),
        "num_hits": sum(record["hits"] for record in read),
        "versions": _versions(),
    }
    # HeadScores refuses a table of zeros: "chase again with more images".
    mean = HeadScores(total / len(read))
    return HeadScores(mean.normalised(), **provenance)


def _versions() -> dict[str, str]:
    import transformers

    import sparsemm

    return {
        "sparsemm": sparsemm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _name_of(model: PreTrainedModel) -> str:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    # A folder of this machine means nothing elsewhere; its last part does.
    return Path(name).resolve().name if Path(name).is_dir() else name


def _progress(pages: Iterable[Page], us: Workers, show: bool) -> Any:
    """A bar of this process's pages; of several processes the first one shows its own."""
    from tqdm.auto import tqdm

    total = -(-length_hint(pages) // us.count) or None
    return tqdm(total=total, unit="image", desc="chase", disable=not (show and us.first))

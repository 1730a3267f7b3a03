"""The chase over many pages: shared among processes, resumable, one table of head scores (spec section 5)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsemm.chase.matching import match_rule
from sparsemm.chase.page import READ_PROMPT, Page, chase_page
from sparsemm.errors import ConfigError, DataError
from sparsemm.head_scores import HeadScores
from sparsemm.models import family_of
from sparsemm.models.identity import identity_of
from sparsemm.models.layers import ragged_layers
from sparsemm.runs.finished import make_once
from sparsemm.runs.results import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


_FIRST_PAGES = 5
"""Of so many each process makes sure that the model can read, before the rest."""

_RECORD = 2
"""Form of what `chase_page` gives: one more whenever an entry changes."""


def chase(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Iterable[Page],
    *,
    match: str = "unique",
    max_new_tokens: int = 1024,
    least_read: float = 0.1,
    prompt: str = READ_PROMPT,
    part: str | None = None,
    exact_grid: bool = False,
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
        pages: Pages in a fixed order. One that cannot be opened, or holds no words, is logged, skipped and counted.
        match: "unique" (the paper's) or "aligned"; see `sparsemm.chase.matching`.
        max_new_tokens: At most so many tokens are read from a page, within the model's positions.
        least_read: Share of the tokens with a letter or digit that must be found on the pages by the aligned rule, on
            the first pages and on all: a model that cannot read shows no visual heads.
        prompt: What the model is asked.
        part: Part of the image's tokens that counts; the main one of a family's layouts by default.
        exact_grid: Whether a padded grid covers just what it shows instead of the whole image; see
            `ModelFamily.image_token_layout`.
        output: File of the result. Beside it, `<name>.images.jsonl` holds what each image gave, as soon as it is known.
        resume: Continue from that file where there is one; an `output` made from as many images or more, with the same
            settings, is left as it is, and returned. False starts again.
        model_name, dataset, seed: Provenance. The model's own name by default.
        progress: Show a progress bar.

    Returns:
        Scores `[num_layers, num_query_heads]` of the layers with ragged rows, with their provenance; saved as `output`
        if given.

    Raises:
        ConfigError: Unknown match rule, `max_new_tokens` below 1, `least_read` outside of 0..1, `exact_grid` of a model
            that pads nothing, or several processes and no `output`.
        DataError: The file to resume from, or `output`, is of another chase, or no page could be read, or less than
            `least_read`.
        HeadScoreError: No head scored at all.
    """
    find_chunks = match_rule(match)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= least_read <= 1:
        raise ConfigError(f"least_read={least_read} must lie between 0 and 1")
    family = family_of(model)
    if exact_grid and not family.pads_grid:
        raise ConfigError(f"exact_grid is of no use with {family.name}, whose grids hold no padding; leave it out")
    text_config = family.text_model(model).config
    layers = ragged_layers(text_config)
    shape = (len(layers), text_config.num_attention_heads)
    identity = identity_of(model)
    settings: dict[str, Any] = {
        "model": model_name or identity.name,
        "weights": identity.weights,
        "dataset": dataset,
        "prompt": prompt,
        "match_rule": match,
        "image_part": part,
        "exact_grid": exact_grid or None,  # as where score files say nothing of it
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "num_kv_heads": text_config.num_key_value_heads,
        "shape": list(shape),
    }
    if len(layers) < text_config.num_hidden_layers:
        settings["layers"] = layers
    return make_once(
        pages,
        lambda page: chase_page(
            model,
            processor,
            page,
            find_chunks,
            prompt=prompt,
            part=part,
            max_new_tokens=max_new_tokens,
            exact_grid=exact_grid,
        ),
        lambda records: _collect(records, shape, settings, least_read),
        load=HeadScores.load,
        output=output,
        journal=None if output is None else journal_path(output),
        settings=settings,
        resume=resume,
        record=_RECORD,
        label="chase",
        tally="hits",
        watch=_first_pages(least_read),
        progress=progress,
    )


def journal_path(output: str | os.PathLike[str]) -> Path:
    """Where `chase` keeps what each image gave, beside its `output`."""
    return Path(output).with_suffix(".images.jsonl")


def _first_pages(least_read: float) -> Callable[[dict[str, Any]], None]:
    """What watches the records of a process: it makes sure after the first pages that the model reads them."""
    first: list[dict[str, Any]] = []

    def watch(record: dict[str, Any]) -> None:
        if "skipped" not in record and len(first) < _FIRST_PAGES:
            first.append(record)
            if len(first) == _FIRST_PAGES:
                _refuse_unread(first, least_read)

    return watch


def _refuse_unread(records: list[dict[str, Any]], least_read: float) -> None:
    """Raise `DataError` unless enough of what was generated stands on the pages."""
    read, matchable = (sum(record[key] for record in records) for key in ("read", "matchable"))
    if read < least_read * matchable or (least_read and not matchable):
        raise DataError(
            f"{read} of the {matchable} tokens with a letter or digit that the model generated on {len(records)} pages "
            f"stand on them, less than {least_read:g}: it cannot read them (crops or more pixels make letters larger), "
            "or their boxes are those of other images; a lower --least-read (in Python least_read) chases all the same"
        )


def _collect(
    records: list[dict[str, Any]], shape: tuple[int, int], settings: dict[str, Any], least_read: float
) -> HeadScores:
    read = [record for record in records if "skipped" not in record]
    if not read:
        raise DataError(f"none of {len(records)} pages could be read; see the log for the reasons")
    _refuse_unread(read, least_read)
    total = torch.zeros(shape, dtype=torch.float64)
    flaws: Counter[str] = Counter()
    for record in read:
        flaws.update(record["flaws"])
        for layer, head, score in record["scores"]:
            total[layer, head] += score
    provenance = {
        **{key: value for key, value in settings.items() if key != "shape"},
        "num_images": len(read),
        "num_skipped": len(records) - len(read),
        **{
            f"num_{key}": sum(record[key] for record in read)
            for key in ("tokens", "matchable", "matched", "hits", "cut")
        },
        "num_flaws": dict(flaws),
        "versions": versions(),
    }
    # HeadScores refuses a table of zeros: "chase again with more images".
    mean = HeadScores(total / len(read))
    return HeadScores(mean.normalised(), **provenance)

"""What chasing costs beside plain generation of the same text, and beside walking attention matrices in Python."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsemm.bench.cells import BenchResults, Times, run_benchmark, take_turns
from sparsemm.chase import READ_PROMPT, chase_page
from sparsemm.chase.matching import match_rule, token_texts
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.models.layers import ragged_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def chase_cost(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Sequence[Any],
    *,
    match: str = "aligned",
    max_new_tokens: int = 64,
    repeats: int = 5,
    progress: bool = True,
) -> tuple[Times, dict[str, Any]]:
    """Reading `pages` one by one: plainly, chasing, and in a loop over whole attention matrices.

    All three build the model's inputs from the images and read the same text. The three take turns, page by page, so
    that what else the machine does hits them alike.

    Args:
        model, processor: From `sparsemm.load_model`; not patched.
        pages: With `image` and `words`.
        match: Match rule of the chase and of the loop.
        max_new_tokens: Longest reading.
        repeats: Rounds.
        progress: Show a progress bar.

    Returns:
        Seconds of all pages in every round, `plain`, `chase` and `loop`; and `chase_over_plain`, `loop_over_chase`,
        `loop_over_plain` of their medians, numbers of pages and tokens.

    Raises:
        ConfigError: `repeats` is below 1.
        DataError: There is no page, or one cannot be read.
    """
    from tqdm.auto import tqdm

    if repeats < 1:
        raise ConfigError(f"repeats={repeats} must be at least 1")
    if not pages:
        raise DataError("there is no page to read")
    ways: dict[str, Callable[[Any], int]] = {
        "plain": lambda page: read_plainly(model, processor, page, max_new_tokens),
        "chase": lambda page: _chase(model, processor, page, match, max_new_tokens),
        "loop": lambda page: walk_attentions(model, processor, page, match, max_new_tokens)[0],
    }
    times = {name: [0.0] * repeats for name in ways}
    tokens = dict.fromkeys(ways, 0)

    def count(name: str, page: Any) -> None:
        tokens[name] += ways[name](page)

    for page in tqdm(pages, unit="page", disable=not progress):
        turns = {name: functools.partial(count, name, page) for name in ways}
        for name, seconds in take_turns(turns, repeats, model.device).items():
            times[name] = [total + value for total, value in zip(times[name], seconds, strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return times, {
        "chase_over_plain": medians["chase"] / medians["plain"],
        "loop_over_chase": medians["loop"] / medians["chase"],
        "loop_over_plain": medians["loop"] / medians["plain"],
        "pages": len(pages),
        "tokens": tokens["plain"] // (repeats + 1),
        "same_number_of_tokens": len(set(tokens.values())) == 1,
    }


def run(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Sequence[Any],
    *,
    model_name: str,
    output: Path | None = None,
    **options: Any,
) -> BenchResults:
    """`chase_cost`, whose options these are, as a file of one cell; measured anew."""
    return run_benchmark(
        "chase",
        [{"pages": len(pages)}],
        lambda *_: chase_cost(model, processor, pages, **options),
        device=model.device,
        settings={"model": model_name, **{name: value for name, value in options.items() if name != "progress"}},
        output=output,
        fresh=True,
        progress=False,
    )


def read_plainly(model: PreTrainedModel, processor: ProcessorMixin, page: Any, max_new_tokens: int) -> int:
    """`model.generate`, unpatched; the number of tokens it read."""
    inputs = family_of(model).build_inputs(processor, [page.image], [READ_PROMPT], device=model.device)
    return generate_greedy(model, inputs, max_new_tokens)[0].shape[1]


def _chase(model: PreTrainedModel, processor: ProcessorMixin, page: Any, match: str, max_new_tokens: int) -> int:
    options: dict[str, Any] = {"prompt": READ_PROMPT, "part": None, "max_new_tokens": max_new_tokens}
    record = chase_page(model, processor, page, match_rule(match), **options)
    if "skipped" in record:
        raise DataError(record["skipped"])
    return record["tokens"]


def walk_attentions(
    model: PreTrainedModel, processor: ProcessorMixin, page: Any, match: str, max_new_tokens: int
) -> tuple[int, torch.Tensor]:
    """The straightforward chase: attention matrices out of every forward, and a Python loop over layers and heads.

    Returns:
        The number of tokens read, and the scores float64 `[num_layers, num_query_heads]`, not normalised.
    """
    family = family_of(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # no other one gives its weights
    try:
        image = page.image
        inputs = family.build_inputs(processor, [image], [READ_PROMPT], device=model.device)
        (layout,) = family.image_token_layout(model.config, inputs, processor=processor, image_sizes=[image.size])[0]
        result = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        model.set_attn_implementation(before)
    ids = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    chunks = match_rule(match)(token_texts(processor.tokenizer, ids), [word.text for word in page.words])
    text_config = family.text_model(model).config
    layers = ragged_layers(text_config)
    scores = torch.zeros(len(layers), text_config.num_attention_heads, dtype=torch.float64)
    for step, chunk in enumerate(chunks):
        if chunk is None:
            continue
        region = set(layout.tokens_in_box(page.words[chunk].box, image.size).tolist())
        for row, layer in enumerate(layers):
            for head in range(scores.shape[1]):
                if int(result.attentions[step][layer][0, head, -1].argmax()) in region:
                    scores[row, head] += 1 / len(region)
    return len(ids), scores

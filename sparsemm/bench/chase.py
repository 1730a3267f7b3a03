"""What chasing costs beside plain generation of the same text, and beside walking attention matrices in Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsemm.chase import READ_PROMPT, chase_page
from sparsemm.chase.matching import match_rule, token_texts
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.runs.results import environment

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
) -> dict[str, Any]:
    """Seconds for reading `pages` one by one: plainly, chasing, and in a loop over whole attention matrices.

    All three build the model's inputs from the images and read the same text. The three take turns, page by page, so
    that what else the machine does hits them alike; of each page the fastest of `repeats` counts.

    Args:
        model, processor: From `sparsemm.load_model`; not patched.
        pages: With `image` and `words`.
        match: Match rule of the chase and of the loop.
        max_new_tokens: Longest reading.
        repeats: Rounds.
        progress: Show a progress bar.

    Returns:
        `plain_seconds`, `chase_seconds`, `loop_seconds`, `chase_over_plain`, `loop_over_chase`, `loop_over_plain`,
        numbers of pages and tokens, and the environment.

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
    best = {name: [float("inf")] * len(pages) for name in ways}
    tokens = {name: 0 for name in ways}
    for read in ways.values():  # lazy set-up is nobody's cost
        read(pages[0])
    with tqdm(total=repeats * len(pages), unit="page", disable=not progress) as bar:
        for turn in range(repeats):
            for index, page in enumerate(pages):
                for name, read in ways.items():
                    _wait(model)
                    start = time.perf_counter()
                    count = read(page)
                    _wait(model)
                    best[name][index] = min(best[name][index], time.perf_counter() - start)
                    tokens[name] += count if turn == 0 else 0
                bar.update()
    seconds = {name: sum(values) for name, values in best.items()}
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "chase_over_plain": seconds["chase"] / seconds["plain"],
        "loop_over_chase": seconds["loop"] / seconds["chase"],
        "loop_over_plain": seconds["loop"] / seconds["plain"],
        "pages": len(pages),
        "tokens": tokens["plain"],
        "same_number_of_tokens": len(set(tokens.values())) == 1,
        "repeats": repeats,
        "environment": environment(model.device),
    }


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
    scores = torch.zeros(text_config.num_hidden_layers, text_config.num_attention_heads, dtype=torch.float64)
    for step, chunk in enumerate(chunks):
        if chunk is None:
            continue
        region = set(layout.tokens_in_box(page.words[chunk].box, image.size).tolist())
        for layer in range(scores.shape[0]):
            for head in range(scores.shape[1]):
                if int(result.attentions[step][layer][0, head, -1].argmax()) in region:
                    scores[layer, head] += 1 / len(region)
    return len(ids), scores


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

"""How much of a model's reading every method keeps at every budget, on pages it never saw."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsemm.config import CompressionConfig
from sparsemm.decoding.generation import generate_greedy
from sparsemm.errors import ConfigError
from sparsemm.experiments.session import PageBatches, describe_head_scores, read, reading_session
from sparsemm.methods import get_method
from sparsemm.runs.metrics import mean_metrics
from sparsemm.runs.results import Cell, Results, environment

if TYPE_CHECKING:
    from sparsemm.documents import Page
    from sparsemm.head_scores import HeadScores

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    processor: Any,
    pages: Iterable[Page],
    *,
    methods: Sequence[str],
    budgets: Sequence[int] = (),
    head_scores: HeadScores | str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    output: str | Path | None = None,
    fresh: bool = False,
    model_name: str | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Cell]:
    """Generate the answers to all pages with every method at every budget; greedy decoding.

    Methods that keep every row (`fullkv`, `mask`, `mask_random`) run once. Each finished cell is in `output` at once;
    a later call with the same settings and that `output` runs only what is missing.

    Args:
        model, processor: From `sparsemm.load_model`; the model is not patched.
        pages: Objects with `image`, `prompt`, `answer`, `task` and `num_words`.
        methods: Names of `sparsemm.methods.METHODS`.
        budgets: Mean rows kept per (layer, kv head), for the methods that compress.
        head_scores: For the methods that need given ones.
        batch_size: Prompts generated together, left padded.
        max_new_tokens: Longest answer.
        output: Result file (JSON).
        fresh: Forget what `output` holds.
        model_name: Written in the results; by default the name of the folder it was loaded from.
        progress: Show a progress bar.
        **options: Further fields of `CompressionConfig`: window_size, ratio, rounding, mask_ratio, seed, ...

    Returns:
        One cell per method and budget, in the order of `methods`, then `budgets`.

    Raises:
        ConfigError: A method or option is unknown, or a budget is too small; before anything runs.
        DataError: There is no page, or `output` holds results of other settings.
    """
    configs = make_grid(methods, budgets, head_scores, options)
    batches = PageBatches.of(model, processor, pages, batch_size)
    settings = {
        **batches.settings(model, model_name, max_new_tokens),
        "head_scores": describe_head_scores(head_scores),
        # Every cell repeats its whole configuration; these are the fields that no cell may differ in.
        "options": {name: value for name, value in configs[0].to_dict().items() if name not in _PER_CELL},
    }
    results = Results.open(output, settings, fresh=fresh)
    missing = [config for config in configs if results.find(config.method, _nominal(config)) is None]
    if len(missing) < len(configs):
        logger.info("%d of %d cells are in %s already", len(configs) - len(missing), len(configs), output)
    with reading_session(model, batches, len(missing), progress=progress) as bar:
        if missing:
            # The first generation pays for lazy set-up that no method should be charged with.
            generate_greedy(model, batches.batches[0].inputs, min(2, max_new_tokens))
        for config in missing:
            bar.set_description(config.method if _nominal(config) is None else f"{config.method} {config.budget}")
            results.add(_run_cell(model, processor, batches, config, max_new_tokens, bar))
    return [results.find(config.method, _nominal(config)) for config in configs]


_PER_CELL = ("method", "budget", "head_scores")


def make_grid(
    methods: Sequence[str], budgets: Sequence[int], head_scores: Any, options: dict[str, Any]
) -> list[CompressionConfig]:
    """The configuration of every cell; methods that keep every row come once, without a budget.

    Raises:
        ConfigError: No method is given, or a method, budget or option does not hold.
    """
    if not methods:
        raise ConfigError("methods is empty; name at least one, such as fullkv and sparsemm")
    configs = []
    for name in dict.fromkeys(methods):
        method = get_method(name)
        if method.compresses and not budgets:
            raise ConfigError(f"method {name!r} needs at least one budget")
        scores = head_scores if method.head_scores == "given" else None
        for budget in dict.fromkeys(budgets) if method.compresses else (None,):
            try:
                configs.append(CompressionConfig(method=name, budget=budget, head_scores=scores, **options))
            except TypeError as error:
                raise ConfigError(f"unknown option in {sorted(options)} ({error})") from None
    return configs


def _nominal(config: CompressionConfig) -> int | None:
    return config.budget if get_method(config.method).compresses else None


# -- one cell -------------------------------------------------------------------------------------------------------


def _run_cell(
    model: nn.Module, processor: Any, batches: PageBatches, config: CompressionConfig, max_new_tokens: int, bar: Any
) -> Cell:
    pages: list[Page] = []
    texts: list[str] = []
    kept: list[float] = []
    step_seconds: list[float] = []
    prompt_tokens = cache_bytes = full_bytes = tokens = 0
    prefill = 0.0
    for reading in read(model, processor, batches, config, max_new_tokens, bar):
        stats, timing = reading.stats, reading.timing
        pages += reading.pages
        texts += reading.texts
        kept += stats.effective_budgets
        prompt_tokens += sum(stats.prompt_tokens)
        cache_bytes += stats.cache_bytes
        full_bytes += stats.full_cache_bytes
        tokens += reading.num_tokens
        prefill += timing.prefill_seconds
        if timing.decode_steps:
            step_seconds.append(timing.decode_seconds / timing.decode_steps)
    whole = mean_metrics(texts, [page.answer for page in pages])
    bar.set_postfix(accuracy=f"{whole['accuracy']:.3f}")
    return Cell(
        method=config.method,
        nominal_budget=_nominal(config),
        effective_budget=sum(kept) / len(kept),
        prompt_tokens=prompt_tokens / len(pages),
        documents=len(pages),
        **whole,
        groups=_by_group(pages, texts),
        cache_bytes=cache_bytes / len(pages),
        full_cache_bytes=full_bytes / len(pages),
        ms_per_token=1000 * statistics.median(step_seconds) if step_seconds else None,
        prefill_ms=1000 * prefill / len(pages),
        tokens=tokens,
        config=config.to_dict(),
        environment=environment(model.device),
    )


def _by_group(pages: list[Page], texts: list[str]) -> dict[str, dict[str, float]]:
    """The metrics of each task, and of each task and number of words."""
    members: dict[str, list[tuple[str, str]]] = {}
    for page, text in zip(pages, texts, strict=True):
        unit = "words" if page.task == "read" else "lines"
        for name in (page.task, f"{page.task}/{page.num_words} {unit}"):
            members.setdefault(name, []).append((text, page.answer))
    return {
        name: {**mean_metrics(*zip(*pairs, strict=True)), "documents": len(pairs)} for name, pairs in members.items()
    }

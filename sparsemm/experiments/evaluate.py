"""How much of a model's reading every method keeps at every budget, on pages it never saw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.cache import share_of_full
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.experiments.session import (
    BatchReading,
    PageReader,
    PageScores,
    describe_head_scores,
    page_scores,
)
from sparsemm.methods import get_method
from sparsemm.runs.results import RunFile, environment
from sparsemm.runs.spread import Spread, is_noisy, spread_of

if TYPE_CHECKING:
    from sparsemm.head_scores import HeadScores


Key = tuple[str, int | None]


@dataclass(frozen=True)
class Cell(PageScores):
    """What one method reached at one budget.

    Attributes:
        method: Name of the method.
        nominal_budget: The budget asked for, in rows per kv head; None for methods that keep every row.
        effective_budget: Prompt rows really kept / (layers * kv heads), mean over the documents.
        prompt_tokens: Prompt length in tokens, mean over the documents.
        documents: Number of documents.
        new_tokens: Tokens that every cache had room for, whatever was generated.
        cache_bytes: Bytes the cache held at the end, a document: prompt rows, room for `new_tokens`, index tensors.
        full_cache_bytes: Bytes of the keys and values of the prompt and of `new_tokens` tokens, a document.
        ms_per_token: Wall time of one decoding step of a whole batch, in ms, over the batches; None when nothing was
            decoded.
        prefill_ms: Wall time of the prompt's forward a document, in ms, over the batches; image features at hand.
        tokens: Tokens generated, summed over the documents (to the end of the longest answer of each batch).
        config: The settings of the run (`CompressionConfig.to_dict`).
        environment: Versions and hardware (`environment`).
    """

    method: str
    nominal_budget: int | None
    effective_budget: float
    prompt_tokens: float
    documents: int
    new_tokens: int
    cache_bytes: float
    full_cache_bytes: float
    ms_per_token: Spread | None
    prefill_ms: Spread
    tokens: int
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def cache_share(self) -> float:
        """What share of a full cache's rows it keeps, for the same prompt and `new_tokens` (`share_of_full`)."""
        return share_of_full(self.effective_budget, self.prompt_tokens, self.new_tokens)

    @property
    def slack_bytes(self) -> float:
        """Bytes held beyond those rows: slots without one, index tensors."""
        return self.cache_bytes - self.cache_share * self.full_cache_bytes

    @property
    def noisy(self) -> bool:
        return is_noisy([self.ms_per_token, self.prefill_ms])

    @property
    def key(self) -> Key:
        """What tells a cell from the others of its file."""
        return self.method, self.nominal_budget

    def to_dict(self) -> dict[str, Any]:
        """JSON values, `cache_share` and `slack_bytes` included for readers of the file."""
        return {**super().to_dict(), "cache_share": self.cache_share, "slack_bytes": self.slack_bytes}


class Results(RunFile[Cell]):
    """An evaluation: its cells, one per method and budget."""

    FORMAT = "sparsemm-evaluation"
    VERSION = 2
    SUBJECT = "an evaluation"
    RUN = Cell
    LISTED = "cells"

    @property
    def cells(self) -> list[Cell]:
        """The runs, in the order they were finished."""
        return self.runs


def evaluate(
    reader: PageReader,
    *,
    methods: Sequence[str],
    budgets: Sequence[int] = (),
    head_scores: HeadScores | str | Path | None = None,
    calibration: HeadScores | str | Path | None = None,
    **options: Any,
) -> list[Cell]:
    """Generate the answers to all pages with every method at every budget; greedy decoding.

    Methods that keep every row (`fullkv`, `mask`, `mask_random`) run once.

    Args:
        methods: Names of `sparsemm.methods.METHODS`.
        budgets: Mean rows kept per (layer, kv head), for the methods that compress.
        head_scores: For the methods that need given ones.
        calibration: For the methods that need one; `head_scores` by default.
        **options: Further fields of `CompressionConfig`: window_size, ratio, rounding, mask_ratio, seed, ...

    Returns:
        One cell per method and budget, in the order of `methods`, then `budgets`.

    Raises:
        ConfigError: A method or option is unknown, or a budget is too small; before anything runs.
        DataError: The reader's output holds results of other settings.
    """
    calibration = head_scores if calibration is None else calibration
    configs = make_grid(methods, budgets, head_scores, options, calibration=calibration)
    some = next(iter(configs.values())).to_dict()
    settings = {
        "head_scores": describe_head_scores(head_scores),
        # Every cell repeats its whole configuration; these are the fields that no cell may differ in.
        "options": {name: value for name, value in some.items() if name not in _PER_CELL},
    }
    if any(get_method(method).needs_calibration for method, _ in configs):
        settings["calibration"] = describe_head_scores(calibration)
    results = reader.run(
        Results,
        settings,
        configs,
        lambda key: nullcontext(configs[key]),
        lambda key, readings: _cell(
            key, configs[key], readings, reader.max_new_tokens, environment(reader.model.device)
        ),
    )
    return [results.find(*key) for key in configs]


_PER_CELL = ("method", "budget", "head_scores")


def make_grid(
    methods: Sequence[str],
    budgets: Sequence[int],
    head_scores: Any,
    options: dict[str, Any],
    calibration: Any = None,
) -> dict[Key, CompressionConfig]:
    """The configuration of every cell by method and budget; methods that keep every row come once, with budget None.

    Raises:
        ConfigError: No method is given, or a method, budget or option does not hold.
    """
    if not methods:
        raise ConfigError("methods is empty; name at least one, such as fullkv and sparsemm")
    configs: dict[Key, CompressionConfig] = {}
    for name in dict.fromkeys(methods):
        method = get_method(name)
        if method.compresses and not budgets:
            raise ConfigError(f"method {name!r} needs at least one budget")
        scores = (calibration if method.needs_calibration else head_scores) if method.needs_head_scores else None
        for budget in dict.fromkeys(budgets) if method.compresses else (None,):
            try:
                configs[name, budget] = CompressionConfig(name, budget, scores, **options)
            except TypeError as error:
                raise ConfigError(f"unknown option in {sorted(options)} ({error})") from None
    return configs


def _cell(
    key: Key, config: CompressionConfig, readings: Sequence[BatchReading], new_tokens: int, place: dict[str, Any]
) -> Cell:
    stats = [reading.stats for reading in readings]
    kept = [budget for each in stats for budget in each.effective_budgets]
    prompt_tokens = statistics.fmean(length for each in stats for length in each.prompt_tokens)
    steps = [1000 * t.decode_seconds / t.decode_steps for t in (r.timing for r in readings) if t.decode_steps]
    return Cell(
        method=key[0],
        nominal_budget=key[1],
        effective_budget=statistics.fmean(kept),
        prompt_tokens=prompt_tokens,
        documents=len(kept),
        new_tokens=new_tokens,
        cache_bytes=sum(each.cache_bytes for each in stats) / len(kept),
        full_cache_bytes=(prompt_tokens + new_tokens) * stats[0].token_bytes,
        ms_per_token=spread_of(steps) if steps else None,
        prefill_ms=spread_of([1000 * each.timing.prefill_seconds / len(each.pages) for each in readings]),
        tokens=sum(reading.num_tokens for reading in readings),
        config=config.to_dict(),
        environment=place,
        **page_scores(readings),
    )

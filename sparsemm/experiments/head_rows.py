"""What the rows of single kv heads are worth: one head after the other keeps more or fewer, and the pages are read.

The causal check of a budget rule, beside the masking experiment: masking takes a head away, this only takes (or gives)
prompt rows. With the full cache and `rows` at the window it tells which heads live on the prompt; under a compressing
method and `rows` at the mean budget, which heads the method starves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, DataError
from sparsemm.experiments.session import (
    BatchReading,
    PageReader,
    PageScores,
    describe_head_scores,
    page_scores,
)
from sparsemm.head_scores import HeadScores, rank_correlation
from sparsemm.methods import METHODS, BudgetRequest, get_method, register_method
from sparsemm.methods.method import ModelBudgetRule
from sparsemm.models import family_of
from sparsemm.models.layers import ragged_layers
from sparsemm.runs.markdown import markdown_table
from sparsemm.runs.results import RunFile

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadRowsRun(PageScores):
    """What a model read with the rows of one kv head changed.

    Attributes:
        layer, head: The kv head; None in the run that changes nothing.
        usual_rows: Prompt rows that the method keeps for it, mean over the pages.
        rows: Prompt rows it got instead; a shorter prompt has no more than its length.
    """

    layer: int | None
    head: int | None
    usual_rows: float | None
    rows: int | None

    @property
    def key(self) -> tuple[int | None, int | None]:
        return self.layer, self.head


class HeadRowsResults(RunFile[HeadRowsRun]):
    """The experiment: the run that changes nothing, then one per kv head."""

    FORMAT = "sparsemm-head-rows"
    VERSION = 2
    SUBJECT = "a head-rows experiment"
    RUN = HeadRowsRun

    @property
    def base(self) -> HeadRowsRun:
        """The run that changes nothing. Raises `DataError` when there is none."""
        found = self.find(None, None)
        if found is None:
            raise DataError("the results hold no run of the unchanged method")
        return found


def head_rows_experiment(
    reader: PageReader, config: CompressionConfig, *, rows: int | None = None, heads: Sequence[Head] | None = None
) -> HeadRowsResults:
    """Read the pages under `config`, then once for each kv head with the rows of that head changed.

    AdaKV's budgets depend on the attention to each prompt: there every run, the first one too, has fixed budgets, the
    mean of what AdaKV gave each head over the pages.

    Args:
        config: Any method.
        rows: Rows of the changed head; by default the window where all rows are kept, else the budget.
        heads: (layer, kv head) pairs; by default all.

    Raises:
        ConfigError: `rows` is smaller than the window, or a head is none of the model.
        DataError: The reader's output holds another experiment.
    """
    text_config = family_of(reader.model).text_model(reader.model).config
    shape = (len(ragged_layers(text_config)), text_config.num_key_value_heads)
    if rows is None:
        rows = config.budget if get_method(config.method).compresses else config.window_size
    if rows < config.window_size:
        raise ConfigError(f"rows={rows} is smaller than window_size={config.window_size}, whose rows are always kept")
    if heads is None:
        heads = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ConfigError(f"kv head {layer}-{head} is none of the model's {shape[0]} layers of {shape[1]}")
    settings = {
        "shape": list(shape),
        "rows": rows,
        "config": {name: value for name, value in config.to_dict().items() if name != "head_scores"},
        "head_scores": describe_head_scores(config.head_scores),
    }

    @functools.cache
    def usual() -> Tensor:
        """Prompt rows that each kv head keeps, mean over the pages: float64 `[num_layers, num_kv_heads]`."""
        return torch.cat([reading.stats.kept_rows for reading in reader.read(config, 1)]).double().mean(0)

    def make_run(key: Head, readings: Sequence[BatchReading]) -> HeadRowsRun:
        given = (None, None) if key == _UNCHANGED else (float(usual()[key]), rows)
        return HeadRowsRun(*key, *given, **page_scores(readings))

    def config_of(key: Head) -> AbstractContextManager[CompressionConfig]:
        return _changed_method(config, usual(), None if key == _UNCHANGED else key, rows)

    return reader.run(HeadRowsResults, settings, [_UNCHANGED, *heads], config_of, make_run)


_UNCHANGED = (None, None)


@contextmanager
def _changed_method(
    config: CompressionConfig, usual: Tensor, changed: Head | None, rows: int
) -> Iterator[CompressionConfig]:
    """A configuration whose method keeps `rows` rows of one head and, of the others, what `config` keeps."""
    usual_rule = _rule(config, usual)

    def rule(request: BudgetRequest) -> LongTensor:
        budgets = usual_rule(request).clone()
        if changed is not None:
            budgets[changed] = min(rows, request.prompt_length)
        return budgets

    method = dataclasses.replace(get_method(config.method), name="head_rows", model_budgets=rule, layer_budgets=None)
    register_method(method)
    try:
        yield dataclasses.replace(config, method=method.name, budget=config.budget or config.window_size)
    finally:
        del METHODS[method.name]


def _rule(config: CompressionConfig, usual: Tensor) -> ModelBudgetRule:
    method = get_method(config.method)
    if method.layer_budgets is None:
        return lambda request: method.budgets(dataclasses.replace(request, settings=config))
    fixed = usual.round().long()
    return lambda request: fixed.clamp(max=request.prompt_length)


def changes(results: HeadRowsResults, task: str | None = None) -> Tensor:
    """Accuracy with a head's rows changed - accuracy as it is: float64 `[num_layers, num_kv_heads]`, NaN if not run.

    Args:
        results: From `head_rows_experiment`.
        task: Only on the pages of this task.

    Raises:
        DataError: The run that changes nothing is missing, or the task is.
    """
    base = results.base.mean("accuracy", task)
    table = torch.full(results.settings["shape"], float("nan"), dtype=torch.float64)
    for run in results.runs:
        if run.layer is not None:
            table[run.layer, run.head] = run.mean("accuracy", task) - base
    return table


def format_head_rows(results: HeadRowsResults, head_scores: HeadScores | None = None, most: int = 10) -> str:
    """A Markdown table of the heads whose rows change most, and how the changes go with the head scores."""
    base, overall = results.base, changes(results)
    tasks = base.tasks
    by_task = {task: changes(results, task) for task in tasks}
    shares = None
    if head_scores is not None:
        shares = head_scores.to_kv_heads(overall.shape[1])
        shares = shares / shares.sum()
    header = ["kv head", "score", "rows", "accuracy", *(f"accuracy: {task}" for task in tasks)]
    lines = [["as it is", "", "", f"{base.accuracy:.3f}", *(f"{base.mean('accuracy', task):.3f}" for task in tasks)]]
    runs = [run for run in results.runs if run.layer is not None]
    runs.sort(key=lambda run: -max(abs(float(table[run.key])) for table in by_task.values()))
    for run in runs[:most]:
        score = "" if shares is None else f"{100 * shares[run.key]:.1f} %"
        cells = [f"{table[run.key]:+.3f}" for table in (overall, *by_task.values())]
        lines.append([f"{run.layer}-{run.head}", score, f"{run.usual_rows:.1f} to {run.rows}", *cells])
    text = markdown_table(header, lines)
    measured = ~overall.isnan()
    for task in tasks if shares is not None and int(measured.sum()) > 2 else []:
        sizes = by_task[task][measured].abs()
        if sizes.std() > 0 and shares[measured].std() > 0:
            found = rank_correlation(sizes, shares[measured])
            text += f"\nrank correlation of the change with the head scores, {task}: {found:.2f}"
    return text

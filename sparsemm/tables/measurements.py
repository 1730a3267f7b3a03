"""Reading results: lmms-eval's `*_results.json`, notes of failed cells, collections of `write_measurements`."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemm.errors import DataError
from sparsemm.io import read_json
from sparsemm.methods import get_method
from sparsemm.runs.metrics import standard_error
from sparsemm.runs.results import Run, RunFile
from sparsemm.runs.spread import Spread

logger = logging.getLogger(__name__)

_RESULTS = re.compile(r"\d{8}_\d{6}_results\.json|failed\.json")
_ERROR = "_stderr"  # behind the name of a metric
_ARGUMENT = re.compile(r"(?:^|,)(\w+)=")


@dataclass(frozen=True)
class Measurement(Run):
    """One cell as it was measured, or that it failed.

    Attributes:
        model: Last part of the checkpoint's path or hub id.
        task: lmms-eval's name of the task.
        method, budget, ratio, window_size, rounding, mask_ratio, seed: Settings; `budget` is None for methods that keep
            every row.
        metrics: lmms-eval's values, by metric.
        standard_errors: Of those metrics that are means over the documents, where the documents' scores are known.
        effective_budget: Prompt rows really kept per kv head, mean over the documents.
        documents: Number of documents.
        cache_share: What share of a full cache's rows was kept (`sparsemm.cache.share_of_full`).
        ms_per_token: Wall time of a decoding step, in ms: median and quartiles; in older results a mean.
        seconds: Wall time of the cell.
        error: Why there are no metrics, for a cell that failed.
    """

    model: str
    task: str
    method: str
    budget: int | None = None
    ratio: float = 0.1
    window_size: int = 32
    rounding: str = "exact"
    mask_ratio: float = 0.1
    seed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    effective_budget: float | None = None
    documents: int | None = None
    cache_share: float | None = None
    ms_per_token: Spread | float | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def of_any_window(self) -> bool:
        """Whether the window does not matter, or is all that is kept (Table 2's first row)."""
        return self.budget is None or (self.method == "sparsemm" and self.budget == self.window_size)

    @property
    def key(self) -> tuple[Any, ...]:
        """What places it in the tables; two of one key are two runs of one cell."""
        relevant = self.ratio if self.method in ("sparsemm", "random") else None
        window = self.window_size if self.budget is not None else None
        seed = self.seed if get_method(self.method).seeded else None
        return self.model, self.task, self.method, self.budget, relevant, window, seed

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without those that are None or empty."""
        return {name: value for name, value in super().to_dict().items() if value not in (None, {})}


class Measurements(RunFile[Measurement]):
    """A collection of cells, without their samples: small enough to keep in a repository."""

    FORMAT = "sparsemm-measurements"
    SUBJECT = "measured cells"
    RUN = Measurement
    LISTED = "cells"


def read_measurements(
    paths: Iterable[str | Path], *, rounding: str | None = None, windows: Collection[int] | None = None
) -> list[Measurement]:
    """All cells in files and, recursively, folders; of two runs of one cell the one written last.

    Args:
        paths: Result files or folders.
        rounding: Keep only cells of this rounding (and those it does not concern).
        windows: The same for window sizes.

    Raises:
        DataError: A path does not exist, a file has another form, or there is no result.
    """
    found: list[tuple[float, Measurement]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist; give result files of lmms-eval or folders of them")
        # Tasks leave other files that end in _results.json (MMBench does): lmms-eval's own begin with the time.
        inside = (file for file in path.rglob("*.json") if _RESULTS.fullmatch(file.name))
        for file in [path] if path.is_file() else sorted(inside):
            found += [(file.stat().st_mtime, each) for each in _read(file)]
    kept: dict[tuple[Any, ...], Measurement] = {}
    for _, each in sorted(found, key=lambda pair: (pair[1].error is None, pair[0])):  # a success replaces a failure
        if rounding is not None and each.budget is not None and each.rounding != rounding:
            continue
        if windows is not None and not each.of_any_window and each.window_size not in windows:
            continue
        before = kept.pop(each.key, None)
        if before is not None and before.error is None and before.metrics != each.metrics:
            logger.warning("%s %s %s %s was measured more than once; the last run counts", *each.key[:4])
        kept[each.key] = each
    if not kept:
        raise DataError(f"there are no results in {', '.join(map(str, paths))}; run scripts/eval/*.sh first")
    return list(kept.values())


def write_measurements(measurements: Iterable[Measurement], path: str | Path) -> None:
    """One file of all cells, in the order of their keys."""
    ordered = sorted(measurements, key=lambda each: [(part is not None, part) for part in each.key])
    Measurements({}, ordered, Path(path)).write()


def _read(file: Path) -> list[Measurement]:
    document = read_json(file)
    if not isinstance(document, dict):
        raise DataError(f"{file} is not a result file; choose another path")
    try:
        if document.get("format") == Measurements.FORMAT:
            return Measurements.load(file).runs
        if "error" in document and "cell" in document:
            cell = document["cell"]
            return [_measurement(cell["model"], cell["task"], cell["settings"], error=document["error"])]
        if "sparsemm" in document:
            return [_from_runner(document["sparsemm"])]
        return _from_lmms_eval(document, file)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not a result file of lmms-eval ({error!r}); choose another path") from error


def _from_runner(part: Mapping[str, Any]) -> Measurement:
    cell, summary = part["cell"], part["summary"]
    return _measurement(
        cell["model"],
        cell["task"],
        cell["settings"],
        metrics=summary["metrics"],
        standard_errors={
            name: error for name, scores in summary.get("scores", {}).items() if (error := standard_error(scores))
        },
        effective_budget=summary["effective_budget"],
        documents=summary["documents"],
        cache_share=summary.get("cache_share"),
        ms_per_token=summary["ms_per_token"],
        seconds=summary["seconds"],
    )


def _from_lmms_eval(document: Mapping[str, Any], file: Path) -> list[Measurement]:
    """Results of lmms-eval's own program with one of this repository's models."""
    settings = parse_arguments(document["config"]["model_args"])
    if "method" not in settings:
        logger.warning("%s is of another model than this repository's; left out", file)
        return []
    kept = document.get("throughput", {})
    measured = []
    for task, values in document["results"].items():
        numbers = {name.partition(",")[0]: value for name, value in values.items() if isinstance(value, (int, float))}
        # One mean over all tasks of the run: of this one only where it was the only one.
        alone = kept if len(document["results"]) == 1 else {}
        measured.append(
            _measurement(
                settings["pretrained"],
                task,
                settings,
                metrics={name: value for name, value in numbers.items() if not name.endswith(_ERROR)},
                standard_errors={
                    name.removesuffix(_ERROR): value for name, value in numbers.items() if name.endswith(_ERROR)
                },
                effective_budget=alone.get("avg_effective_budget"),
                documents=document.get("n-samples", {}).get(task, {}).get("effective"),
                cache_share=alone.get("avg_cache_share"),
            )
        )
    return measured


def _measurement(model: str, task: str, settings: Mapping[str, Any], **values: Any) -> Measurement:
    method = get_method(settings["method"])
    names = ("ratio", "window_size", "rounding", "mask_ratio", "seed")
    return Measurement(
        model=Path(model).name,
        task=task,
        method=settings["method"],
        budget=int(settings["budget"]) if method.compresses else None,
        **{name: settings[name] for name in names if name in settings},
        **values,
    )


def parse_arguments(text: str) -> dict[str, Any]:
    """lmms-eval's `name=value,name=value`; a comma inside a value does not end it."""
    starts = list(_ARGUMENT.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[1]: _value(text[match.end() : end]) for match, end in zip(starts, ends, strict=True)}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

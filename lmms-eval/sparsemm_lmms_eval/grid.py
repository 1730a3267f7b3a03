"""Which cells a table has: model x task x method x budget, and the two ablations of the paper."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import LARGE, defaults_of, is_miniature, resolve_model, short_name
from sparsemm.cli.options import Rounding, Settings
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import get_method
from sparsemm.models.identity import checkpoint_identity

METHODS = ("fullkv", "sparsemm", "snapkv", "pyramidkv", "adakv", "random", "mask", "mask_random")
MINIATURE_BUDGETS = (8, 16, 24, 32, 64, 128)
OFFLINE_TASKS = ("sparsemm_read", "sparsemm_field")
PAPER_TASKS = ("docvqa_val", "ocrbench", "textvqa_val", "chartqa", "textcaps_val")
SHORT_BUDGETS = (48, 64, 96, 128, 256, 512)
SHORT_TASKS = ("mmbench_en_dev_static", "gqa", "vqav2_val")
"""Benchmarks of Table 4, with its budgets; the paper ran them on Qwen2-VL only."""

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0)
"""Table 1, at budget 256 on OCRBench."""
MINIATURE_DOCUMENTS = 200


@dataclass(frozen=True)
class Cell:
    """One evaluation: everything that decides its result.

    Attributes:
        model: Checkpoint folder, hub id, or the short name of a miniature.
        task: Name of an lmms-eval task.
        settings: Fields of `CompressionConfig` (head scores as a path), all of them.
        loading: Arguments of the model other than those: dtype, device, pixel limits, ...
        limit: Number of documents; None for all.
    """

    model: str
    task: str
    settings: dict[str, Any]
    loading: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def config(self) -> CompressionConfig:
        return CompressionConfig(**self.settings)

    @property
    def label(self) -> str:
        """Method and what tells its cells apart: `sparsemm-b64-r0.1-w4`."""
        settings, method = self.settings, get_method(self.settings["method"])
        parts = [settings["method"]]
        if method.compresses:
            parts.append(f"b{settings['budget']}")
            if settings["method"] in ("sparsemm", "random"):
                parts.append(f"r{settings['ratio']:g}")
            parts.append(f"w{settings['window_size']}")
        elif settings["method"] != "fullkv":
            parts.append(f"m{settings['mask_ratio']:g}")
        return "-".join(parts)

    def folder(self, output: Path) -> Path:
        """Where the files go: other settings, scores or weights give another folder, other paths to them do not."""
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:8]
        return output / short_name(self.model) / self.task / f"{self.label}-{digest}"

    def _identity(self) -> dict[str, Any]:
        # A checkpoint trained on is another one under the same name; one that is not here stands for itself.
        values = {**self.to_dict(), "model": checkpoint_identity(self.model).weights or self.model}
        scores = values["settings"].get("head_scores")
        if scores is not None:
            values["settings"]["head_scores"] = hashlib.sha256(Path(scores).read_bytes()).hexdigest()
        # None of these changes an answer (beyond rounding): a run may go on with another batch size or machine.
        for name in ("device", "device_map", "batch_size", "tensor_parallel"):
            values["loading"].pop(name, None)
        return values


@dataclass(frozen=True)
class TableSettings(Settings):
    """Settings of a compression, with the rounding that suits the model."""

    rounding: Annotated[
        Rounding | None, typer.Option(help="[default: paper, for miniatures and methods without a release exact].")
    ] = None

    def fields(self, model: str) -> dict[str, Any]:
        # Cells of the paper's tables stand beside its own numbers; those of miniatures have none to match.
        rounding = self.rounding or ("exact" if is_miniature(model) else "paper")
        return {**super().fields(model), "rounding": rounding}


@dataclass(frozen=True)
class Shared:
    """What all cells of a run have in common; None takes the model's default."""

    model: str
    settings: TableSettings
    limit: int | None = None
    loading: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def head_scores(self) -> HeadScores | None:
        """The scores of the model, if there are any; read and said once."""
        return self.settings.find(self.model)

    def cell(self, task: str, method: str, budget: int | None, **changes: Any) -> Cell:
        """A checked cell, `changes` among its settings. Raises `ConfigError` when a setting does not hold."""
        if task in OFFLINE_TASKS and defaults_of(self.model).page_size != LARGE.page_size:
            raise ConfigError(
                f"{task} has pages of {LARGE.page_size} pixels, {self.model} reads larger ones; use `sparsemm evaluate`"
            )
        chosen = get_method(method)
        if self.settings.rounding is None and not chosen.paper_rounding:
            changes["rounding"] = "exact"
        config = dataclasses.replace(self.settings, **changes).config(self.model, method, budget, self.head_scores)
        settings = config.to_dict()
        if config.head_scores is not None:
            settings["head_scores"] = str(self.settings.file(self.model, calibrated=chosen.needs_calibration))
        limit = self.limit
        if limit is None and is_miniature(self.model):
            limit = MINIATURE_DOCUMENTS
        return Cell(resolve_model(self.model), task, settings, self.loading, limit)


def main_grid(
    shared: Shared,
    methods: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    short_tasks: bool = False,
) -> list[Cell]:
    """The cells of Tables 3 and 4, those that keep every row first and once.

    `short_tasks` adds the benchmarks of Table 4, each with the budgets it has there.

    Raises:
        ConfigError: A method is unknown, a budget too small, or head scores are missing.
    """
    small = is_miniature(shared.model)
    if tasks is None:
        tasks = OFFLINE_TASKS if small else (*PAPER_TASKS, *(SHORT_TASKS if short_tasks else ()))
    chosen = list(dict.fromkeys(methods or METHODS))
    chosen.sort(key=lambda name: get_method(name).compresses)
    cells = []
    for task in dict.fromkeys(tasks):
        default = MINIATURE_BUDGETS if small else SHORT_BUDGETS if task in SHORT_TASKS else LARGE.budgets
        for method in chosen:
            grid = dict.fromkeys(budgets or default) if get_method(method).compresses else (None,)
            cells += [shared.cell(task, method, budget) for budget in grid]
    return cells


def ratio_grid(shared: Shared, tasks: Sequence[str] | None = None, budgets: Sequence[int] | None = None) -> list[Cell]:
    """Table 1: SparseMM with 0 to all of the budget beyond the window shared alike.

    Raises:
        ConfigError: There are several budgets, or a setting does not hold.
    """
    small = is_miniature(shared.model)
    tasks = tasks or (OFFLINE_TASKS if small else ("ocrbench",))
    budgets = budgets or (12 if small else 256,)
    if len(budgets) > 1:
        raise ConfigError(f"budgets {tuple(budgets)}: Table 1 has one budget, give one")
    return [shared.cell(task, "sparsemm", budgets[0], ratio=ratio) for task in tasks for ratio in RATIOS]


def parts_grid(shared: Shared, tasks: Sequence[str] | None = None, budgets: Sequence[int] | None = None) -> list[Cell]:
    """Table 2: the local window alone (as wide as the budget), window and uniform part (ratio 1), all three."""
    small = is_miniature(shared.model)
    tasks = tasks or (OFFLINE_TASKS if small else ("mmbench_en_dev_static",))
    cells = []
    for task in tasks:
        for budget in budgets or (MINIATURE_BUDGETS if small else SHORT_BUDGETS):
            cells.append(shared.cell(task, "sparsemm", budget, window_size=budget, ratio=0.0))
            cells += [shared.cell(task, "sparsemm", budget, ratio=ratio) for ratio in (1.0, shared.settings.ratio)]
    return cells

"""A method against the best of the others, page by page: accuracies, and the paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsemm.errors import DataError
from sparsemm.experiments.evaluate import Cell
from sparsemm.methods import METHODS
from sparsemm.runs.markdown import table_of, with_error
from sparsemm.runs.metrics import standard_error

SURE = 2.0
"""So many standard errors are called a difference."""


@dataclass(frozen=True)
class Pair:
    """One budget and task.

    Attributes:
        mean, error: Of the method, and its standard error over the documents.
        rival: The best other method, by mean; `rival_mean` and `rival_error` are its.
        difference: Mean over the documents of method - rival, `difference_error` its standard error.
    """

    task: str
    budget: int
    mean: float
    error: float | None
    rival: str
    rival_mean: float
    rival_error: float | None
    difference: float
    difference_error: float | None

    @property
    def verdict(self) -> int:
        """1 or -1 where the difference is above or below `SURE` standard errors, else 0."""
        if not self.difference_error:
            return 0
        return (self.difference > SURE * self.difference_error) - (self.difference < -SURE * self.difference_error)


def pair_with_best(cells: Sequence[Cell], method: str, *, metric: str = "accuracy") -> list[Pair]:
    """`method` in every task and at every budget, beside the best other method that drops rows.

    The documents of a run are the same for every cell, in one order, so scores are paired. Two methods whose budgets
    follow the curves of a calibration are no others to one another.

    Raises:
        DataError: The method was not run at any budget, or no other one was.
    """
    own = [cell for cell in cells if cell.method == method and cell.nominal_budget is not None]
    if not own:
        known = ", ".join(sorted({cell.method for cell in cells if cell.nominal_budget is not None}))
        raise DataError(f"method={method!r} has no cell with a budget; the results have {known}")
    pairs = []
    for task in sorted({task for cell in own for task in cell.tasks}, reverse=True):
        for cell in sorted(own, key=lambda each: each.nominal_budget):
            rivals = [
                each
                for each in cells
                if each.nominal_budget == cell.nominal_budget and not _same_kind(method, each.method)
            ]
            if not rivals:
                raise DataError(f"no other method was run at budget {cell.nominal_budget}; compare needs one")
            best = max(rivals, key=lambda each: each.mean(metric, task))
            pairs.append(_pair(cell, best, task, metric))
    return pairs


def _same_kind(first: str, second: str) -> bool:
    ours = ("calibrated", "calibrated_mixkv")
    return first == second or all(name in METHODS and METHODS[name].head_scores in ours for name in (first, second))


def _pair(cell: Cell, rival: Cell, task: str, metric: str) -> Pair:
    ours, theirs = cell.documents_of(metric, task), rival.documents_of(metric, task)
    differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    return Pair(
        task,
        cell.nominal_budget,
        statistics.fmean(ours),
        standard_error(ours),
        rival.method,
        statistics.fmean(theirs),
        standard_error(theirs),
        statistics.fmean(differences),
        standard_error(differences),
    )


def format_pairs(pairs: Sequence[Pair], method: str) -> str:
    """A Markdown table of `pair_with_best`, and one line that counts."""
    columns: dict[str, Callable[[Pair], str]] = {
        "task": lambda pair: pair.task,
        "budget": lambda pair: str(pair.budget),
        method: lambda pair: with_error(pair.mean, pair.error),
        "best other": lambda pair: f"{with_error(pair.rival_mean, pair.rival_error)} ({pair.rival})",
        "paired difference": lambda pair: with_error(pair.difference, pair.difference_error, "+.3f"),
        f"beyond {SURE:g} errors": lambda pair: ("behind", "", "ahead")[pair.verdict + 1],
    }
    ahead, behind = (sum(pair.verdict == way for pair in pairs) for way in (1, -1))
    best = sum(pair.difference >= 0 for pair in pairs)
    return (
        f"{table_of(pairs, columns)}\n\n{method}: best in {best} of {len(pairs)} cells; {ahead} ahead and {behind} "
        f"behind by more than {SURE:g} standard errors; mean difference "
        f"{statistics.fmean(pair.difference for pair in pairs):+.3f}"
    )

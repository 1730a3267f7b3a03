"""A score file made of many items: left as it is where it is finished, gone on with where it is not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from operator import length_hint
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from sparsemm.errors import DataError
from sparsemm.runs.processes import workers
from sparsemm.runs.sharing import work_through

logger = logging.getLogger(__name__)


class Scores(Protocol):
    """What is made: a table that says what it was made with."""

    values: Tensor
    provenance: dict[str, Any]

    def save(self, path: str | os.PathLike[str], /) -> None: ...


Made = TypeVar("Made", bound=Scores)


def make_once(
    items: Iterable[Any],
    work: Callable[[Any], dict[str, Any]],
    collect: Callable[[list[dict[str, Any]]], Made],
    *,
    load: Callable[[str | os.PathLike[str]], Made],
    output: str | os.PathLike[str] | None,
    journal: Path | None,
    settings: dict[str, Any],
    resume: bool,
    record: int | None = None,
    **how: Any,
) -> Made:
    """What `collect` makes of the records of all items, saved as `output` by one of the processes.

    With `resume`, an `output` made from as many items or more is left as it is, and returned.

    Args:
        items, work, settings, how: See `sparsemm.runs.sharing.work_through`; `settings` are compared with the shape and
            the provenance of what lies in `output`, too.
        collect: Makes the scores; their provenance counts the items as `num_images` or `num_pages`, and `num_skipped`.
        load: Reads what lies in `output`.
        output: File of the result, or None.
        journal: File of the records, as soon as they are known.
        resume: Go on with what `journal` and `output` hold. False starts again.
        record: Number of the form that records have; a journal whose records have another is not gone on with.

    Raises:
        ConfigError: Several processes and no `journal`.
        DataError: `output` or `journal` was made with other settings, or does not say with which.
    """
    before = _made_before(load, output, settings) if output is not None and resume else None
    if before is not None and _is_enough(before, output, length_hint(items)):
        return before
    form = {} if record is None else {"record": record}
    records = work_through(items, work, path=journal, settings={**settings, **form}, resume=resume, **how)
    made = collect(records)
    if before is not None and _is_enough(before, output, len(records)):  # the items did not say how many they are
        return before
    us = workers()
    if output is not None and us.first:
        made.save(output)
    us.wait()
    return made


def _made_before(
    load: Callable[[str | os.PathLike[str]], Made], output: str | os.PathLike[str], settings: dict[str, Any]
) -> Made | None:
    if not Path(output).exists():
        return None
    scores = load(output)
    found = {"shape": list(scores.values.shape), **scores.provenance}
    differences = [
        f"{name}: {found.get(name)!r} there, {value!r} here"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if differences:
        raise DataError(
            f"{output} holds scores of other settings ({'; '.join(differences)}); choose another output, or replace it "
            "with --fresh (in Python resume=False)"
        )
    return scores


def _is_enough(scores: Scores, output: str | os.PathLike[str], wanted: int) -> bool:
    """Whether finished scores were made from as many images as are `wanted`, or more (0: it is not known)."""
    count = sum(scores.provenance.get(name, 0) for name in ("num_images", "num_pages", "num_skipped"))
    if not 0 < wanted <= count:
        return False
    if workers().first:
        level = logging.WARNING if wanted < count else logging.INFO
        logger.log(level, "%s was made from %d images, %d are asked for: it is left as it is", output, count, wanted)
    return True

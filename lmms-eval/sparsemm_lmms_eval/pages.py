"""The offline tasks: pages that are drawn when they are read, words and fonts that no miniature was trained on.

lmms-eval hands a document `{"index": n}`; everything else follows from the index and the task. Functions of both tasks
come in pairs because a task file can only name a function, not give it arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsemm.documents import make_page
from sparsemm.runs.metrics import mean_metrics

if TYPE_CHECKING:
    import PIL.Image

    from sparsemm.documents import Page

PAGE_SEED = 2
"""Not 0 (`sparsemm evaluate`) and not 1 (the chase): visual heads are not chosen on the pages they are judged by."""


@functools.lru_cache(maxsize=1024)
def page(task: str, index: int) -> Page:
    """Held-out page `index` of `task`: 1-4 words to read, or 2-5 lines of a form of which one is asked for."""
    least = 1 if task == "read" else 2
    return make_page(index, split="heldout", task=task, num_words=least + index % 4, seed=PAGE_SEED)


def _score(task: str, document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ANLS, character accuracy and exact match of one answer, each between 0 and 1."""
    return mean_metrics([results[0]], [page(task, document["index"]).answer])


def read_visual(document: Mapping[str, Any]) -> list[PIL.Image.Image]:
    return [page("read", document["index"]).image]


def read_text(document: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return page("read", document["index"]).prompt


def read_target(document: Mapping[str, Any]) -> str:
    return page("read", document["index"]).answer


def read_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _score("read", document, results)


def field_visual(document: Mapping[str, Any]) -> list[PIL.Image.Image]:
    return [page("field", document["index"]).image]


def field_text(document: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return page("field", document["index"]).prompt


def field_target(document: Mapping[str, Any]) -> str:
    return page("field", document["index"]).answer


def field_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _score("field", document, results)

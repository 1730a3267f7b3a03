"""What experiments on pages share: pages in batches, reading them under one configuration, settings to compare."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparsemm
from sparsemm.config import CompressionConfig
from sparsemm.decoding.generation import Timing, generate_greedy, remember_image_features
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.models.identity import weights_digest
from sparsemm.runs.metrics import mean_metrics, score_metrics
from sparsemm.runs.results import Run, RunFile

if TYPE_CHECKING:
    from sparsemm.cache import CacheStats
    from sparsemm.documents import Page
    from sparsemm.head_scores import HeadScores


def heldout_pages(
    count: int,
    *,
    tasks: Sequence[str] = ("read", "field"),
    num_words: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
    size: int = 224,
) -> list[Page]:
    """`count` held-out pages, tasks taking turns and `num_words` spread evenly over each task's pages.

    Args:
        count: Number of pages.
        tasks: `read` (everything on the page) and `field` (the value of one label of a form).
        num_words: Words of a `read` page. A `field` page with fewer than two lines would ask nothing: it has at
            least two.
        seed: Another seed gives other pages.
        size: Side of a page in pixels.

    Raises:
        DataError: A number is not positive, or a task is unknown.
    """
    from sparsemm.documents import make_page

    if count < 1 or not tasks or not num_words:
        raise DataError(f"count={count}, tasks={tuple(tasks)} and num_words={tuple(num_words)} describe no page")
    pages = []
    for index in range(count):
        task = tasks[index % len(tasks)]
        words = num_words[index // len(tasks) % len(num_words)]
        if task == "field":
            words = max(2, words)
        pages.append(make_page(index, split="heldout", task=task, num_words=words, seed=seed, size=size))
    return pages


@dataclass(frozen=True)
class PageBatch:
    """Pages that are read together, and the model's inputs for them."""

    pages: list[Page]
    inputs: dict[str, Tensor]


@dataclass
class PageBatches:
    """Pages made into model inputs once, for all runs of an experiment.

    Attributes:
        batches: In the order they are read.
        batch_size: Pages of all but the last.
        digest: Of the pages' prompts, answers and pixels, in the order they were given.
    """

    batch_size: int
    digest: str
    batches: list[PageBatch] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, processor: Any, pages: Iterable[Page], batch_size: int) -> PageBatches:
        """Prepare `pages`: objects with `image`, `prompt`, `answer`, `task` and `num_words`.

        Raises:
            DataError: There is no page.
            ConfigError: `batch_size` is not positive.
        """
        pages = list(pages)
        if not pages:
            raise DataError("there is no page to read")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is too small; it must be at least 1")
        digest = hashlib.sha256()
        for page in pages:
            digest.update(f"{page.prompt}\0{page.answer}\0{page.image.size}\0".encode())
            digest.update(page.image.tobytes())
        # Answers of like length side by side: a batch decodes until its longest answer ends.
        ordered = sorted(pages, key=lambda page: (page.task, page.num_words))
        made = cls(batch_size, digest.hexdigest()[:16])
        family = family_of(model)
        for start in range(0, len(ordered), batch_size):
            chosen = ordered[start : start + batch_size]
            images, prompts = [page.image for page in chosen], [page.prompt for page in chosen]
            made.batches.append(PageBatch(chosen, family.build_inputs(processor, images, prompts, device=model.device)))
        return made

    def __len__(self) -> int:
        return sum(len(batch.pages) for batch in self.batches)

    def settings(self, model: nn.Module, model_name: str | None, max_new_tokens: int) -> dict[str, Any]:
        """What runs have to agree in to be compared, as JSON values: model, pages, batches, device."""
        return {
            "model": model_name or Path(model.config.name_or_path).name or type(model).__name__,
            "weights": weights_digest(model),
            "pages_digest": self.digest,
            "documents": len(self),
            "batch_size": self.batch_size,
            "max_new_tokens": max_new_tokens,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        }


def describe_head_scores(head_scores: HeadScores | str | Path | None) -> dict[str, Any] | None:
    """Shape, digest and provenance of the scores, the same for a table and for its file; wherever that lies."""
    if head_scores is None:
        return None
    from sparsemm.head_scores import HeadScores

    table = head_scores if isinstance(head_scores, HeadScores) else HeadScores.load(head_scores)
    return table.describe()


def run_missing(
    model: nn.Module,
    processor: Any,
    batches: PageBatches,
    results: RunFile,
    keys: Iterable[Any],
    config_of: Callable[[Any], AbstractContextManager[CompressionConfig]],
    make_run: Callable[[Any, Sequence[BatchReading]], Run],
    *,
    max_new_tokens: int,
    progress: bool,
) -> None:
    """Read all pages under the configuration of every key that has no run in `results` yet, and add what `make_run`
    makes of each. In evaluation mode, without gradients, images encoded once."""
    from tqdm.auto import tqdm

    missing = results.missing(keys)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            remember_image_features(model, capacity=len(batches.batches)),
            tqdm(total=len(missing) * len(batches), unit="page", disable=not progress, smoothing=0.05) as bar,
        ):
            for key in missing:
                bar.set_description(" ".join(str(part) for part in key if part is not None) or "as it is")
                with config_of(key) as config:
                    readings = []
                    for reading in read(model, processor, batches, config, max_new_tokens):
                        bar.update(len(reading.pages))
                        readings.append(reading)
                results.add(make_run(key, readings))
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class BatchReading:
    """What was read from one batch.

    Attributes:
        pages: The pages.
        texts: The model's answers, in the same order.
        num_tokens: Tokens generated, each answer counted to the end of the longest.
        stats: What the cache kept.
        timing: How long it took.
    """

    pages: list[Page]
    texts: list[str]
    num_tokens: int
    stats: CacheStats
    timing: Timing


def read(
    model: nn.Module, processor: Any, batches: PageBatches, config: CompressionConfig, max_new_tokens: int
) -> Iterator[BatchReading]:
    """Answer every batch greedily under `config`; the model is patched until the last."""
    with sparsemm.patch(model, config, reserve=max_new_tokens) as handle:
        # Lazy set-up, of the process or of the method, is no document's cost.
        generate_greedy(model, batches.batches[0].inputs, min(3, max_new_tokens))
        for batch in batches.batches:
            tokens, timing = generate_greedy(model, batch.inputs, max_new_tokens)
            texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            yield BatchReading(batch.pages, texts, tokens.numel(), handle.stats, timing)


@dataclass(frozen=True, kw_only=True)
class PageScores(Run):
    """How well pages were read; every run of an experiment is one.

    Attributes:
        accuracy, exact_match, anls: Means over the documents, between 0 and 1 (`sparsemm.runs.metrics`).
        scores: The three of every document, by task and number of words: `{"read/3 words": {"accuracy": [...], ...}}`.
    """

    accuracy: float
    exact_match: float
    anls: float
    scores: dict[str, dict[str, list[float]]]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that were read."""
        return sorted({name.partition("/")[0] for name in self.scores})

    def documents_of(self, metric: str, group: str | None = None) -> list[float]:
        """The scores of all documents, or of those of a task, or of a task and number of words ("read/3 words").

        Raises:
            DataError: There is no such group.
        """
        names = [name for name in self.scores if group in (None, name, name.partition("/")[0])]
        if not names:
            known = ", ".join([*self.tasks, *self.scores])
            raise DataError(f"task={group!r} is not in the results; use one of {known}")
        return [value for name in names for value in self.scores[name][metric]]

    def mean(self, metric: str, group: str | None = None) -> float:
        """Of `documents_of`."""
        return statistics.fmean(self.documents_of(metric, group))


def page_scores(readings: Sequence[BatchReading]) -> dict[str, Any]:
    """The fields of `PageScores` for what was read."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for reading in readings:
        for page, text in zip(reading.pages, reading.texts, strict=True):
            unit = "words" if page.task == "read" else "lines"
            parts.setdefault(f"{page.task}/{page.num_words} {unit}", []).append((text, page.answer))
    scores = {name: score_metrics(*zip(*pairs, strict=True)) for name, pairs in sorted(parts.items())}
    means = mean_metrics(*zip(*(pair for pairs in parts.values() for pair in pairs), strict=True))
    return {**means, "scores": scores}

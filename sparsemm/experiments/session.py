"""What experiments on pages share: pages in batches, reading them under one configuration, settings to compare."""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

import sparsemm
from sparsemm.config import CompressionConfig
from sparsemm.decoding.generation import Timing, generate_greedy, remember_image_features
from sparsemm.errors import ConfigError, DataError
from sparsemm.models import family_of
from sparsemm.models.identity import identity_of
from sparsemm.models.parallel import tensor_parallel_of
from sparsemm.runs.metrics import mean_metrics, score_metrics, standard_error
from sparsemm.runs.results import Run, RunFile, environment

if TYPE_CHECKING:
    from sparsemm.cache import CacheStats
    from sparsemm.documents import Page
    from sparsemm.head_scores import HeadScores

AnyResults = TypeVar("AnyResults", bound=RunFile)


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


@dataclass
class PageReader:
    """A model, the pages it is to read, and where what it reads is written: what every experiment starts from.

    Attributes:
        model, processor: From `sparsemm.load_model`; not patched.
        pages: Objects with `image`, `prompt`, `answer`, `task` and `num_words`.
        batch_size: Pages generated together, left padded.
        max_new_tokens: Longest answer; by default 48, or what the pages' longest answer may take, at most a token a
            character.
        output: Result file (JSON), complete after every run; a later experiment does only what is missing.
        fresh: Forget what `output` holds.
        model_name: Written in the results; by default the name of the folder it was loaded from.
        progress: Show a progress bar.

    Raises:
        DataError: There is no page.
        ConfigError: `batch_size` is not positive.
    """

    model: nn.Module
    processor: Any
    pages: Iterable[Page]
    _: KW_ONLY
    batch_size: int = 16
    max_new_tokens: int | None = None
    output: str | Path | None = None
    fresh: bool = False
    model_name: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        from sparsemm.documents import room_for_answers

        self.pages = list(self.pages)
        if not self.pages:
            raise DataError("there is no page to read")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} is too small; it must be at least 1")
        if self.max_new_tokens is None:
            self.max_new_tokens = max(48, room_for_answers(self.pages))

    @functools.cached_property
    def batches(self) -> list[tuple[list[Page], dict[str, Tensor]]]:
        """Pages that are read together and the model's inputs for them, made once for all runs.

        Answers of like length lie side by side, as a batch decodes until its longest answer ends.
        """
        ordered = sorted(self.pages, key=lambda page: (page.task, page.num_words))
        batches = []
        for start in range(0, len(ordered), self.batch_size):
            chosen = ordered[start : start + self.batch_size]
            images, prompts = [page.image for page in chosen], [page.prompt for page in chosen]
            build = family_of(self.model).build_inputs
            batches.append((chosen, build(self.processor, images, prompts, device=self.model.device)))
        return batches

    def settings(self) -> dict[str, Any]:
        """What runs have to agree in to be compared, as JSON values: model, pages, batches, device."""
        model, digest = self.model, hashlib.sha256()
        identity = identity_of(model)
        for page in self.pages:
            digest.update(f"{page.prompt}\0{page.answer}\0{page.image.size}\0".encode())
            digest.update(page.image.tobytes())
        return {
            "model": self.model_name or identity.short_name or type(model).__name__,
            "weights": identity.weights,
            "pages_digest": digest.hexdigest()[:16],
            "documents": len(self.pages),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "environment": environment(model.device),
        }

    def read(self, config: CompressionConfig, max_new_tokens: int) -> Iterator[BatchReading]:
        """Answer every batch greedily under `config`; the model is patched until the last."""
        with sparsemm.patch(self.model, config, reserve=max_new_tokens) as handle:
            # Lazy set-up, of the process or of the method, is no document's cost.
            generate_greedy(self.model, self.batches[0][1], min(3, max_new_tokens))
            for pages, inputs in self.batches:
                tokens, timing = generate_greedy(self.model, inputs, max_new_tokens)
                texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                yield BatchReading(pages, texts, tokens.numel(), handle.stats, timing)

    def run(
        self,
        results_class: type[AnyResults],
        settings: dict[str, Any],
        keys: Iterable[Any],
        config_of: Callable[[Any], AbstractContextManager[CompressionConfig]],
        make_run: Callable[[Any, Sequence[BatchReading]], Run],
    ) -> AnyResults:
        """Read all pages under the configuration of every key that has no run in `output` yet, and add what `make_run`
        makes of each. In evaluation mode, without gradients, images encoded once.

        Raises:
            DataError: `output` holds another experiment, or other settings than `settings` and the reader's own.
        """
        from tqdm.auto import tqdm

        results = results_class.open(self.output, {**self.settings(), **settings}, fresh=self.fresh)
        parallel = tensor_parallel_of(self.model)
        if not parallel.first:
            results.path = None  # one of the processes that hold the model writes
        missing = results.missing(keys)
        total = len(missing) * len(self.pages)
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                torch.inference_mode(),
                remember_image_features(self.model, capacity=len(self.batches)),
                tqdm(total=total, unit="page", disable=not self.progress, smoothing=0.05) as bar,
            ):
                for key in missing:
                    bar.set_description(" ".join(str(part) for part in key if part is not None) or "as it is")
                    with config_of(key) as config:
                        readings = []
                        for reading in self.read(config, self.max_new_tokens):
                            bar.update(len(reading.pages))
                            readings.append(reading)
                    results.add(make_run(key, readings))
        finally:
            self.model.train(was_training)
        parallel.collect(None)  # the file is whole when any of them goes on
        return results


def describe_head_scores(head_scores: HeadScores | str | Path | None) -> dict[str, Any] | None:
    """Shape, digest and provenance of the scores, the same for a table and for its file; wherever that lies."""
    if head_scores is None:
        return None
    from sparsemm.head_scores import HeadScores

    table = head_scores if isinstance(head_scores, HeadScores) else HeadScores.load(head_scores)
    return table.describe()


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

    def error(self, metric: str, group: str | None = None) -> float | None:
        """The standard error of `mean`; None of one document."""
        return standard_error(self.documents_of(metric, group))


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

"""How well a text was read: character accuracy, exact match and ANLS, each between 0 and 1.

All three compare `clean_text` of both sides: ends stripped, runs of white space counted as one space.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5


def clean_text(text: str) -> str:
    """`text` without white space at its ends, inner runs of white space replaced by one space."""
    return " ".join(text.split())


def character_accuracy(prediction: str, reference: str) -> float:
    """`1 - Levenshtein distance / max(len(prediction), len(reference))`, 1 for two empty texts; case counts."""
    return 1.0 - Levenshtein.normalized_distance(clean_text(prediction), clean_text(reference))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when both texts are the same, case included, else 0.0."""
    return float(clean_text(prediction) == clean_text(reference))


def anls(prediction: str, references: str | Iterable[str], *, threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one answer, as DocVQA scores it.

    With NL the Levenshtein distance of the lower-cased texts divided by the longer length, the score is the best over
    the references of `1 - NL if NL < threshold else 0` (Biten et al., "Scene Text Visual Question Answering", ICCV
    2019, equation 1).

    Args:
        prediction: The model's answer.
        references: The accepted answer, or several of them.
        threshold: From this distance on an answer counts as wrong.

    Raises:
        ValueError: No reference is given.
    """
    accepted = [references] if isinstance(references, str) else list(references)
    if not accepted:
        raise ValueError("references is empty; give at least one accepted answer")
    answer = clean_text(prediction).lower()
    distances = (Levenshtein.normalized_distance(answer, clean_text(reference).lower()) for reference in accepted)
    return max(1.0 - distance if distance < threshold else 0.0 for distance in distances)


METRIC_LABELS = {"accuracy": "Character accuracy", "exact_match": "Exact match", "anls": "ANLS"}

METRICS: dict[str, Callable[[str, str], float]] = {
    "accuracy": character_accuracy,
    "exact_match": exact_match,
    "anls": anls,
}


def score_metrics(predictions: Iterable[str], references: Iterable[str]) -> dict[str, list[float]]:
    """Every metric of `METRICS`, pair by pair.

    Raises:
        ValueError: No pair is given, or the two differ in number.
    """
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        raise ValueError("there is no prediction to score")
    return {name: [metric(*pair) for pair in pairs] for name, metric in METRICS.items()}


def mean_metrics(predictions: Iterable[str], references: Iterable[str]) -> dict[str, float]:
    """Mean of every metric over pairs of texts; raises as `score_metrics`."""
    return {name: statistics.fmean(values) for name, values in score_metrics(predictions, references).items()}


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean of independent scores: sample deviation / sqrt(number); None of fewer than two."""
    return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None

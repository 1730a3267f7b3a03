"""Files of head scores as plain values: ours, chased or calibrated, and those of the original release."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm.errors import HeadScoreError
from sparsemm.io import write_json_atomic

FORMAT = "sparsemm-head-scores"
CALIBRATION_FORMAT = "sparsemm-calibration"
FORMAT_VERSION = 1
_KEY = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class ScoreFile:
    """What a file of head scores holds.

    Attributes:
        values: One row a layer, all of one length, one number a query head.
        provenance: Where they come from, as JSON values.
        curves: What a calibration measured beside them, by the names of the fields of `sparsemm.head_scores.Curves`.
        release: Whether it is one of the original release, whose scores are not normalised.
    """

    values: list[list[float]]
    provenance: dict[str, Any]
    curves: dict[str, Any] | None = None
    release: bool = False


def write_scores(path: str | os.PathLike[str], file: ScoreFile) -> None:
    """Write a file of ours, atomically."""
    num_heads = len(file.values[0])
    document = {
        "format": FORMAT if file.curves is None else CALIBRATION_FORMAT,
        "version": FORMAT_VERSION,
        "num_layers": len(file.values),
        "num_query_heads": num_heads,
        "provenance": file.provenance,
        "values": file.values,
        **(file.curves or {}),
    }
    by_line = file.curves is None and len(file.values) * num_heads <= 4096
    write_json_atomic(path, document, indent=1 if by_line else None)


def read_scores(path: str | os.PathLike[str]) -> ScoreFile:
    """Read a file of ours, or one of the original release (`{"layer-head": [score, ...]}`), averaged over samples.

    Raises:
        HeadScoreError: The file is missing, not JSON or in neither format, or holds something else than numbers.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        ours = isinstance(document, dict) and document.get("format") in (FORMAT, CALIBRATION_FORMAT)
        return _from_document(document) if ours else _from_release(document, source=Path(path).name)
    except FileNotFoundError:
        raise HeadScoreError(f"head-score file {os.fspath(path)} does not exist; check the path") from None
    except OSError as error:
        raise HeadScoreError(f"head-score file {os.fspath(path)} cannot be read ({error})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HeadScoreError(f"head-score file {os.fspath(path)} is not valid JSON ({error})") from error
    except HeadScoreError as error:
        raise HeadScoreError(f"{os.fspath(path)}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HeadScoreError(f"key {twice!r} occurs twice")
    return mapping


def _from_document(document: dict[str, Any]) -> ScoreFile:
    version = document.get("version")
    if version != FORMAT_VERSION:
        raise HeadScoreError(
            f"format version {version!r} is not {FORMAT_VERSION}; use the library version that wrote it"
        )
    if "values" not in document:
        raise HeadScoreError("the table 'values' is missing")
    provenance = document.get("provenance", {})
    if not isinstance(provenance, dict):
        raise HeadScoreError("'provenance' is not an object")
    values = _numbers(document["values"])
    for name, found in {"num_layers": len(values), "num_query_heads": len(values[0]) if values else 0}.items():
        if document.get(name, found) != found:
            raise HeadScoreError(f"{name} is {document[name]!r}, but the table has {found}")
    return ScoreFile(values, provenance, _curves(document))


def _curves(document: dict[str, Any]) -> dict[str, Any] | None:
    if document["format"] == FORMAT:
        return None
    missing = [name for name in ("rows", "sensitivities", "distortions") if not isinstance(document.get(name), list)]
    if missing:
        raise HeadScoreError(f"the calibration has no {' and no '.join(missing)}")
    names = ("rows", "sensitivities", "distortions", "retrieval", "distortions_mixkv")
    return {name: document.get(name) for name in names}


def _numbers(rows: Any) -> list[list[float]]:
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise HeadScoreError("'values' is not a list of rows, one per layer")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise HeadScoreError(f"layers have different numbers of heads ({sorted(lengths)}); a head is missing")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise HeadScoreError(f"layer {layer}, head {head} is {value!r}, not a number")
    return rows


def _from_release(document: Any, *, source: str) -> ScoreFile:
    if not isinstance(document, dict) or not document:
        raise HeadScoreError('neither a {"layer-head": [score, ...]} file nor one of this package')
    means: dict[tuple[int, int], float] = {}
    for key, samples in document.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise HeadScoreError(f'key {key!r} is not of the form "layer-head", such as "0-31"')
        means[int(match[1]), int(match[2])] = _mean_score(key, samples)
    num_layers = max(layer for layer, _ in means) + 1
    num_heads = max(head for _, head in means) + 1
    if len(means) != num_layers * num_heads:
        missing = next(
            f"{layer}-{head}" for layer in range(num_layers) for head in range(num_heads) if (layer, head) not in means
        )
        raise HeadScoreError(
            f"head {missing!r} is missing ({len(means)} of {num_layers} x {num_heads} heads are there)"
        )
    values = [[means[layer, head] for head in range(num_heads)] for layer in range(num_layers)]
    return ScoreFile(values, {"source": source, "source_format": "release"}, release=True)


def _mean_score(key: str, samples: Any) -> float:
    if not isinstance(samples, list) or not samples:
        raise HeadScoreError(f"key {key!r} holds {samples!r}, not a list of one score per sample")
    for value in samples:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise HeadScoreError(f"key {key!r} holds {value!r}, which is not a number")
        if not math.isfinite(value):
            raise HeadScoreError(f"key {key!r} holds NaN or infinity")
        if value < 0:
            raise HeadScoreError(f"key {key!r} holds the negative score {value!r}")
    return math.fsum(samples) / len(samples)

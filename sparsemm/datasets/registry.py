"""Opening any data set by name, path or hub id."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsemm.datasets.annotations import PLAIN_FILE, read_coco, read_ctw, read_mlt, read_plain
from sparsemm.datasets.generated import GENERATORS, GeneratedPages
from sparsemm.datasets.hub import HubPages, is_saved
from sparsemm.datasets.pdf import PdfPages, is_pdf
from sparsemm.errors import DataError
from sparsemm.io import read_json

_READERS: dict[str, Callable[..., list[Any]]] = {
    "plain": read_plain,
    "mlt": read_mlt,
    "ctw": read_ctw,
    "coco": read_coco,
}
FORMATS = ("synthdog", *_READERS, "pdf")
_OPTIONS = {"ctw": {"unit"}, "pdf": {"page_range", "max_pixels", "crops", "unit", "fewest_words"}}

_SUFFIXES = {".parquet": "synthdog", ".jsonl": "ctw", ".pdf": "pdf"}


def open_pages(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterable[Any]:
    """Pages of a data set, each with `image` and `words` (`text`, `box`), in a fixed order.

    Args:
        source: Name of a generator ("documents", "miniature"), hub id, annotation file or folder that holds one, PDF
            file or folder of them.
        format: "synthdog" (a Hugging Face data set), "plain", "mlt", "ctw", "coco" or "pdf"; recognised where not
            given.
        images: Folder of the images, where it is not that of the annotations.
        split: Split of a Hugging Face data set.
        limit: At most so many pages; for a generator exactly so many (1000 by default).
        seed: Of a generator; data sets are read in their own order.
        **options: Of the generator (`size`, `unit`, `num_words`) or reader (`unit` of CTW; those of `PdfPages`).

    Raises:
        DataError: There is no such data set, or it has another form, or none of its images is there; or an option does
            not belong to it.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} must be at least 1")
    name = os.fspath(source)
    if name in GENERATORS and format is None:
        return GeneratedPages(name, 1000 if limit is None else limit, seed=seed, **options)
    format = recognise(name) if format is None else format
    if format not in FORMATS:
        raise DataError(f"format={format!r} is unknown; use one of {', '.join(FORMATS)}")
    unknown = set(options) - _OPTIONS.get(format, set())
    if unknown:
        raise DataError(f"{format} data sets have no option {', '.join(sorted(unknown))}")
    if format == "synthdog":
        return HubPages(name, split=split, limit=limit)
    path = Path(name)
    if not path.exists():
        raise DataError(f"{name} does not exist; check the path")
    if format == "pdf":
        return PdfPages(path, limit=limit, **options)
    path = path if format == "mlt" else _annotation_file(path) or path
    pages = _READERS[format](path, None if images is None else Path(images), **options)[:limit]
    if pages and not any(page.source.is_file() for page in pages):  # single ones that are missing are skipped
        raise DataError(f"none of the {len(pages)} images of {path} is there ({pages[0].source}); give --images")
    return pages


def _annotation_file(folder: Path) -> Path | None:
    """`boxes.json`, else the only JSON file, of a folder that is no Hugging Face data set."""
    if not folder.is_dir() or is_saved(folder):
        return None
    found = [path for path in sorted(folder.glob("*.json*")) if path.suffix in (".json", ".jsonl")]
    named = [path for path in found if path.name == PLAIN_FILE]
    return named[0] if named else found[0] if len(found) == 1 else None


def recognise(source: str) -> str:
    """The format of what lies at `source`; what does not exist is taken for a hub id where it looks like one.

    Raises:
        DataError: It cannot be told, or there is nothing.
    """
    path = Path(source)
    if path.is_dir():
        if any(path.glob("gt_*.txt")):
            return "mlt"
        if file := _annotation_file(path):
            return recognise(str(file))
        return "mlt" if any(path.glob("*.txt")) else "pdf" if any(map(is_pdf, path.iterdir())) else "synthdog"
    if path.is_file():
        if path.suffix.lower() in _SUFFIXES:
            return _SUFFIXES[path.suffix.lower()]
        if path.suffix == ".json":
            # COCO's file names its categories; reading the whole file for that is what its reader does, too.
            document = read_json(path)
            return "coco" if isinstance(document, dict) and "categories" in document else "plain"
        raise DataError(f"the format of {source} is not clear from its name; give it: {', '.join(FORMATS)}")
    if source.count("/") == 1 and source[0] not in "./~":
        return "synthdog"
    raise DataError(f"{source} does not exist; check the path, or give a hub id, or {' or '.join(GENERATORS)}")

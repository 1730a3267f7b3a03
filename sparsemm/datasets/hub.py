"""Hugging Face data sets with the schema of `nnethercott/synthdog-en-detection`, streamed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsemm.datasets.base import BoxedImage, read_words
from sparsemm.errors import DataError
from sparsemm.io import reach_hub

IMAGE_COLUMN, BOX_COLUMN = "image", "2_coord"


class HubPages:
    """Rows of a data set with the columns `image` and `2_coord` (a list of `{"chunk": text, "coord": points}`, pixels).

    Rows are read one after the other as they are asked for, images not before they are looked at; nothing is copied or
    downloaded beyond what is read.

    Args:
        source: Hub id, folder (of parquet files, or made by `save_to_disk`), or parquet file.
        split: Split to read.
        limit: At most so many rows.

    Raises:
        DataError: There is no such data set or split, or a column is missing.
    """

    def __init__(self, source: str | Path, *, split: str = "train", limit: int | None = None) -> None:
        self.source, self.split, self.limit = source, split, limit
        self._rows, self._total = open_rows(source, split, {IMAGE_COLUMN, BOX_COLUMN})

    def __len__(self) -> int:
        """Number of rows. Raises `TypeError` where the data set does not say."""
        if self._total is None:
            raise TypeError(f"{self.source} does not say how many rows it has")
        return self._total if self.limit is None else min(self._total, self.limit)

    def __length_hint__(self) -> int:
        return self.limit or 0

    def __iter__(self) -> Iterator[BoxedImage]:
        for index, row in enumerate(itertools.islice(self._rows, self.limit)):
            name = f"{self.split}-{index:06d}"
            yield BoxedImage(name, image_source(row), partial(_words, row, f"{self.source}, row {index}"))


def image_source(row: dict[str, Any]) -> Path | bytes:
    """Where the image of a row of `open_rows` is: bytes as a rule; a data set of paths only has none."""
    image = row[IMAGE_COLUMN] or {}
    content = image.get("bytes")
    return content if content is not None else Path(image["path"]) if image.get("path") else b""


def _words(row: dict[str, Any], where: str) -> list[Any]:
    boxes = row[BOX_COLUMN]
    # Older versions of the library give a list of structures as a structure of lists.
    if isinstance(boxes, dict):
        boxes = [{"chunk": chunk, "coord": coord} for chunk, coord in zip(boxes["chunk"], boxes["coord"], strict=True)]
    return read_words(boxes or [], where)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_rows(source: str | os.PathLike[str], split: str, columns: set[str]) -> tuple[Any, int | None]:
    """The rows of a Hugging Face data set, images not decoded, and how many there are, where it says so.

    Raises:
        DataError: There is no such data set or split, or one of the `columns` is missing.
    """
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading this data set needs the datasets package: pip install 'sparsemm[data]'") from error
    path = Path(source)
    try:
        if is_saved(path):
            saved = datasets.load_from_disk(str(path))
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            total: int | None = len(rows)
        elif path.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=True)
            total = pyarrow.parquet.read_metadata(path).num_rows
        else:
            if not path.exists():
                reach_hub(str(source), "README.md", kind="dataset")
            rows = datasets.load_dataset(str(source), split=split, streaming=True)
            known = (rows.info.splits or {}).get(split)
            total = known.num_examples if known is not None and known.num_examples else None
        found = rows.column_names or list(next(iter(rows.take(1)), {}))
    except DataError:
        raise
    except Exception as error:  # the library raises dozens of kinds: offline, no such hub id, no such split, …
        raise DataError(f"{source} cannot be opened as a data set with split {split!r}: {error}") from error
    missing = columns.difference(found)
    if missing:
        raise DataError(f"{source} has no column {', '.join(sorted(missing))}; it has {', '.join(found)}")
    return rows.cast_column(IMAGE_COLUMN, datasets.Image(decode=False)), total

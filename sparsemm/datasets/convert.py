"""Writing pages in any of the formats that can be read."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

from sparsemm.datasets.annotations import DONT_CARE, PLAIN_FILE
from sparsemm.documents.pages import TextBox, sound_words
from sparsemm.documents.pdf_writer import write_pdf
from sparsemm.errors import DataError
from sparsemm.io import write_bytes_atomic, write_json_atomic

logger = logging.getLogger(__name__)

Entry = tuple[str, tuple[int, int], Sequence[TextBox]]
"""File name of a written image, its (width, height), its text boxes."""


def convert(
    pages: Iterable[Any], output: str | Path, format: str, *, progress: bool = True
) -> tuple[int, int, Counter[str]]:
    """Write `pages` into the folder `output`: images as PNG (in `images/`), and the annotations.

    What is written opens with `open_pages(output)`.
    Pages that cannot be read are logged and left out.

    Args:
        pages: With `image` and `words`, from `open_pages`.
        output: A folder that is not there yet, or empty.
        format: "plain", "synthdog" (parquet), "mlt", "ctw", "coco" or "pdf" (`pages.pdf`; read its boxes as lines).
        progress: Show a progress bar.

    Returns:
        Number of pages written, of those left out, and of words by what was wrong with them (`sound_words`).

    Raises:
        DataError: The format is unknown, `output` holds files, or a text cannot be written in the format.
    """
    from tqdm.auto import tqdm

    if format not in WRITERS:
        raise DataError(f"format={format!r} is unknown; use one of {', '.join(WRITERS)}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder; choose another output")
    skipped = 0
    flaws: Counter[str] = Counter()
    bar = tqdm(pages, total=length_hint(pages) or None, unit="page", disable=not progress)

    def readable() -> Iterator[tuple[Any, list[TextBox]]]:
        nonlocal skipped
        for page in bar:
            try:
                image = page.image
                words, found = sound_words(page.words, image.size)
            except DataError as error:
                logger.warning("page %s left out: %s", getattr(page, "name", ""), error)
                skipped += 1
                continue
            flaws.update(found)
            yield image, words

    if format in ("synthdog", "pdf"):
        folder.mkdir(parents=True, exist_ok=True)
        return WRITERS[format](readable(), folder), skipped, flaws
    images = folder if format == "mlt" else folder / "images"
    entries: list[Entry] = []
    for index, (image, words) in enumerate(readable()):
        name = f"img_{index + 1:06d}.png"
        write_bytes_atomic(images / name, _png(image))
        entries.append((name if format == "mlt" else f"images/{name}", image.size, words))
    if not entries:
        raise DataError(f"none of {skipped} pages could be read; see the log for the reasons")
    WRITERS[format](entries, folder)
    return len(entries), skipped, flaws


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_plain(entries: list[Entry], folder: Path) -> None:
    rows = [
        {"image": name, "words": [{"text": word.text, "box": list(word.box)} for word in words]}
        for name, _, words in entries
    ]
    write_json_atomic(folder / PLAIN_FILE, {"images": rows}, indent=1)


def _write_mlt(entries: list[Entry], folder: Path) -> None:
    for name, _, words in entries:
        lines = []
        for word in words:
            if "\n" in word.text or "\r" in word.text or word.text == DONT_CARE:
                raise DataError(f"the text {word.text!r} cannot be written in a line of MLT's format")
            x0, y0, x1, y1 = (f"{value:g}" for value in word.box)
            lines.append(f"{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1},None,{word.text}\n")
        write_bytes_atomic(folder / f"gt_{Path(name).stem}.txt", "".join(lines).encode())


def _write_ctw(entries: list[Entry], folder: Path) -> None:
    lines = []
    for name, (width, height), words in entries:
        # One "character" a text box: its polygon is the only place for a box.
        boxes = ((word.text, *word.box) for word in words)
        annotations = [
            [{"text": text, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}] for text, x0, y0, x1, y1 in boxes
        ]
        entry = {"image_id": Path(name).stem, "file_name": name, "width": width, "height": height}
        lines.append(json.dumps({**entry, "annotations": annotations, "ignore": []}, ensure_ascii=False) + "\n")
    write_bytes_atomic(folder / "annotations.jsonl", "".join(lines).encode())


def _write_coco(entries: list[Entry], folder: Path) -> None:
    names = sorted({word.text for _, _, words in entries for word in words})
    numbers = {text: number for number, text in enumerate(names, start=1)}
    images, annotations = [], []
    for index, (name, (width, height), words) in enumerate(entries, start=1):
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for word in words:
            x0, y0, x1, y1 = word.box
            extent = [x0, y0, x1 - x0 + 1, y1 - y0 + 1]
            common = {"id": len(annotations) + 1, "image_id": index, "category_id": numbers[word.text], "iscrowd": 0}
            annotations.append({**common, "bbox": extent, "area": extent[2] * extent[3]})
    categories = [{"id": number, "name": text} for text, number in numbers.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_json_atomic(folder / "annotations.json", document, indent=None)


_ROWS_A_GROUP = 32


def _write_parquet(pages: Iterator[tuple[Any, list[TextBox]]], folder: Path) -> int:
    """`train.parquet` with the columns of SynthDoG's schema, written group by group."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("writing parquet needs the datasets package: pip install 'sparsemm[data]'") from error
    boxes = [{"chunk": datasets.Value("string"), "coord": [[datasets.Value("float64")]]}]
    features = datasets.Features({"image": datasets.Image(), "2_coord": boxes})
    temporary = folder / ".train.parquet.part"
    rows = (
        {
            "image": {"bytes": _png(image), "path": None},
            "2_coord": [{"chunk": word.text, "coord": [list(word.box[:2]), list(word.box[2:])]} for word in words],
        }
        for image, words in pages
    )
    count = 0
    with pyarrow.parquet.ParquetWriter(temporary, features.arrow_schema) as writer:
        while group := list(itertools.islice(rows, _ROWS_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=features.arrow_schema))
            count += len(group)
    temporary.replace(folder / "train.parquet")
    return count


def _write_pdf(pages: Iterator[tuple[Any, list[TextBox]]], folder: Path) -> int:
    temporary = folder / ".pages.pdf.part"
    count = write_pdf(pages, temporary)
    temporary.replace(folder / "pages.pdf")
    return count


WRITERS: dict[str, Callable[..., Any]] = {
    "plain": _write_plain,
    "synthdog": _write_parquet,
    "mlt": _write_mlt,
    "ctw": _write_ctw,
    "coco": _write_coco,
    "pdf": _write_pdf,
}

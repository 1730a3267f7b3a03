"""Annotation files: plain JSON, ICDAR MLT, Chinese Text in the Wild (CTW) and COCO objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemm.datasets.base import BoxedImage, bounding_box, box_of_extent, find_images, image_path, read_words
from sparsemm.documents.pages import TextBox, joined
from sparsemm.errors import DataError
from sparsemm.io import read_json

PLAIN_FILE = "boxes.json"
DONT_CARE = "###"
"""What MLT writes in place of text that nobody can read."""


@contextmanager
def _expecting(what: str) -> Iterator[None]:
    """Raise `DataError` saying that it is not `what` when an entry lacks a field or has another one in its place."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{what} ({type(error).__name__}: {error})") from error


def read_plain(source: Path, images: Path | None = None) -> list[BoxedImage]:
    """Plain JSON: `{"images": [{"image": "1.png", "words": [{"text": "date", "box": [x0, y0, x1, y1]}]}]}`.

    Args:
        source: The file. Its list may stand alone; `image_name` and `2_coord` (`[{"chunk": …, "coord": …}]`) are read
            like `image` and `words`.
        images: Folder that image names are relative to; that of the file by default.

    Raises:
        DataError: The file has another form.
    """
    document = read_json(source)
    entries = document.get("images") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise DataError(f'{source} is neither a list of images nor {{"images": […]}}')
    pages = []
    for number, entry in enumerate(entries):
        where = f"{source}, image {number}"
        name = entry.get("image", entry.get("image_name")) if isinstance(entry, dict) else None
        boxes = entry.get("words", entry.get("2_coord")) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(boxes, list):
            raise DataError(f"{where}: no 'image' and 'words'")
        pages.append(BoxedImage(name, image_path(images or source.parent, name, where), read_words(boxes, where)))
    return pages


def read_mlt(source: Path, images: Path | None = None) -> list[BoxedImage]:
    """ICDAR MLT 2017 and 2019: a folder of text files, one an image, `gt_<image>.txt` or `<image>.txt`.

    A line is `x1,y1,x2,y2,x3,y3,x4,y4,script,transcription`: four corners, and all that follows the ninth comma is
    text. Lines with the text `###` (don't care) are left out.

    Args:
        source: Folder of the text files.
        images: Folder of the images; `source` by default.

    Raises:
        DataError: A line has another form, there is no text file, or an image is missing.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder of gt_<image>.txt files")
    found = find_images(images or source)
    pages = []
    for path in sorted(source.glob("*.txt"), key=_by_number):
        stem = path.stem.removeprefix("gt_")
        if stem not in found:
            raise DataError(f"{path} has no image {stem}.* in {images or source}; give its folder with --images")
        pages.append(BoxedImage(found[stem].name, found[stem], _mlt_words(path)))
    if not pages:
        raise DataError(f"{source} holds no gt_<image>.txt file")
    return pages


def _mlt_words(path: Path) -> list[TextBox]:
    words = []
    with _expecting(f"{path} is not UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        fields = line.split(",", 9)
        if len(fields) < 10:
            raise DataError(f"{path}, line {number}: {line!r} is not x1,y1,…,x4,y4,script,transcription")
        if fields[9] != DONT_CARE:
            words.append(TextBox(fields[9], bounding_box(fields[:8], f"{path}, line {number}")))
    return words


def read_ctw(source: Path, images: Path | None = None, *, unit: str = "line") -> list[BoxedImage]:
    """Chinese Text in the Wild: a `.jsonl` file, one image a line.

    `annotations` is a list of text lines, each a list of characters with `text` and `polygon` (four points) or
    `adjusted_bbox` (`[x, y, width, height]`); regions of `ignore` are left out.

    Args:
        source: The file.
        images: Folder of the images (`file_name`, else `<image_id>.jpg`); that of the file by default.
        unit: A text box is a "line" (its characters joined) or a "character".

    Raises:
        DataError: The unit is unknown, or a line of the file has another form.
    """
    if unit not in ("line", "character"):
        raise DataError(f"unit={unit!r} is unknown; use line or character")
    pages = []
    with _expecting(f"{source} is not UTF-8"):
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        where = f"{source}, line {number}"
        with _expecting(f"{where} is not an annotated image of CTW"):
            entry = json.loads(line)
            name = entry.get("file_name") or f"{entry['image_id']}.jpg"
            groups = [[_ctw_character(one, where) for one in group] for group in entry["annotations"] if group]
        words = [word for group in groups for word in (group if unit == "character" else [joined(group, "")])]
        pages.append(BoxedImage(name, image_path(images or source.parent, name, where), words))
    return pages


def _ctw_character(entry: dict[str, Any], where: str) -> TextBox:
    if "polygon" in entry:
        return TextBox(entry["text"], bounding_box(entry["polygon"], where))
    return TextBox(entry["text"], box_of_extent(entry["adjusted_bbox"], where))


def read_coco(source: Path, images: Path | None = None) -> list[BoxedImage]:
    """COCO object boxes (`instances_*.json`): the category's name is the text. Crowd regions are left out.

    Args:
        source: The file, with `images`, `annotations` and `categories`.
        images: Folder of the images; that of the file by default.

    Raises:
        DataError: The file has another form, or an annotation names an unknown image or category.
    """
    document = read_json(source)
    with _expecting(f"{source} is not a COCO object file"):
        categories = {entry["id"]: entry["name"] for entry in document["categories"]}
        boxes: dict[Any, list[TextBox]] = {entry["id"]: [] for entry in document["images"]}
        for number, entry in enumerate(document["annotations"]):
            if not entry.get("iscrowd"):
                box = box_of_extent(entry["bbox"], f"{source}, annotation {number}")
                boxes[entry["image_id"]].append(TextBox(categories[entry["category_id"]], box))
        folder = images or source.parent
        return [
            BoxedImage(entry["file_name"], image_path(folder, entry["file_name"], str(source)), boxes[entry["id"]])
            for entry in document["images"]
        ]


def _by_number(path: Path) -> tuple[str, int, str]:
    """img_2 before img_10."""
    digits = path.stem[len(path.stem.rstrip("0123456789")) :]
    return path.stem.removesuffix(digits), int(digits or 0), path.stem

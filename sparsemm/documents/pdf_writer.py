"""Writing pages as a PDF file: each a picture, with its words as invisible text at their boxes, as scanners do."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparsemm.documents.pages import TextBox
from sparsemm.documents.pdf import LARGEST_DPI

if TYPE_CHECKING:
    import PIL.Image

_POINTS = 72 / LARGEST_DPI
"""Of a pixel: rendered as large as it may be, a page has the pixels that it was made of."""

_CODES = 255  # of one font


class _Glyphs:
    """Numbers for characters, 255 a font; its glyphs are blank squares, so that a character's box is its cell."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def place(self, character: str) -> tuple[int, int]:
        """Font and code of a character."""
        font, code = divmod(self.numbers.setdefault(character, len(self.numbers)), _CODES)
        return font, code + 1

    def fonts(self) -> list[str]:
        """The characters of each font."""
        characters = list(self.numbers)
        return ["".join(characters[start : start + _CODES]) for start in range(0, len(characters), _CODES)]


def write_pdf(pages: Iterable[tuple[PIL.Image.Image, Sequence[TextBox]]], path: Path) -> int:
    """Write RGB images with their text boxes, one page each; their number. `open_pages(path)` gives them back."""
    glyphs = _Glyphs()
    kids: list[int] = []
    with path.open("wb") as file:
        objects = _Objects(file)
        catalogue, tree, resources = (objects.reserve() for _ in range(3))
        for image, words in pages:
            width, height = image.size
            size = f"/Width {width} /Height {height} /ColorSpace /DeviceRGB /BitsPerComponent 8"
            picture = objects.stream(f"/Type /XObject /Subtype /Image {size}", image.tobytes())
            # A hair smaller than the page: rounded up to another pixel it would be blurred.
            drawn = f"q {width * _POINTS - 1e-4:.6f} 0 0 {height * _POINTS - 1e-4:.6f} 0 0 cm /Picture Do Q\nBT 3 Tr\n"
            text = drawn + "".join(_word(word, height, glyphs) for word in words) + "ET"
            content = objects.stream("", text.encode())
            box = f"/MediaBox [0 0 {width * _POINTS:.6f} {height * _POINTS:.6f}]"
            named = f"/Resources << /XObject << /Picture {picture} 0 R >> /Font {resources} 0 R >>"
            kids.append(objects.add(f"<< /Type /Page /Parent {tree} 0 R {box} {named} /Contents {content} 0 R >>"))
        fonts = [_font(objects, characters) for characters in glyphs.fonts()]
        objects.add("<< " + " ".join(f"/F{index} {font} 0 R" for index, font in enumerate(fonts)) + " >>", resources)
        references = " ".join(f"{kid} 0 R" for kid in kids)
        objects.add(f"<< /Type /Pages /Count {len(kids)} /Kids [{references}] >>", tree)
        objects.add(f"<< /Type /Catalog /Pages {tree} 0 R >>", catalogue)
        objects.finish(catalogue)
    return len(kids)


def _word(word: TextBox, height: int, glyphs: _Glyphs) -> str:
    """Text operators of a word, each character as wide as the others, and a line end after it."""
    x0, y0, x1, y1 = word.box
    size = (y1 + 1 - y0) * _POINTS
    stretch = 100 * (x1 + 1 - x0) / (len(word.text) * (y1 + 1 - y0))
    # PDFium reads a word that is one piece.
    runs = itertools.groupby(map(glyphs.place, word.text + "\n"), key=lambda place: place[0])
    shown = (f"/F{font} {size:.6f} Tf <{''.join(f'{code:02x}' for _, code in run)}> Tj" for font, run in runs)
    return f"{stretch:.6f} Tz 1 0 0 1 {x0 * _POINTS:.6f} {(height - y1 - 1) * _POINTS:.6f} Tm {' '.join(shown)}\n"


def _font(objects: _Objects, characters: str) -> int:
    codes = range(1, len(characters) + 1)
    blank = objects.stream("", b"1000 0 0 0 1000 1000 d1")
    lines = [f"<{code:02x}> <{text.encode('utf-16-be').hex()}>" for code, text in zip(codes, characters, strict=True)]
    # A block of a character map holds at most 100 lines.
    blocks = [lines[start : start + 100] for start in range(0, len(lines), 100)]
    mapped = "\n".join("\n".join((f"{len(block)} beginbfchar", *block, "endbfchar")) for block in blocks)
    to_unicode = objects.stream(
        "",
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /Text def /CMapType 2 def\n"
        f"1 begincodespacerange <00> <ff> endcodespacerange\n{mapped}\nendcmap end end".encode(),
    )
    return objects.add(
        "<< /Type /Font /Subtype /Type3 /FontBBox [0 0 1000 1000] /FontMatrix [.001 0 0 .001 0 0] "
        f"/FirstChar 1 /LastChar {len(codes)} /Widths [{'1000 ' * len(codes)}] "
        f"/CharProcs << {' '.join(f'/g{code} {blank} 0 R' for code in codes)} >> "
        f"/Encoding << /Differences [1 {' '.join(f'/g{code}' for code in codes)}] >> /ToUnicode {to_unicode} 0 R >>"
    )


class _Objects:
    """The numbered objects of a file being written, and where each begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: list[int] = []
        file.write(b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n")

    def reserve(self) -> int:
        """A number for an object that follows later."""
        self._places.append(0)
        return len(self._places)

    def add(self, body: str | bytes, number: int | None = None) -> int:
        """Write an object; its number."""
        number = number or self.reserve()
        self._places[number - 1] = self._file.tell()
        self._file.write(
            f"{number} 0 obj\n".encode() + (body.encode() if isinstance(body, str) else body) + b"\nendobj\n"
        )
        return number

    def stream(self, entries: str, data: bytes) -> int:
        """Write a compressed stream; its number."""
        packed = zlib.compress(data)
        head = f"<< {entries} /Filter /FlateDecode /Length {len(packed)} >>\nstream\n".encode()
        return self.add(head + packed + b"\nendstream")

    def finish(self, catalogue: int) -> None:
        """Write the table of places."""
        start, count = self._file.tell(), len(self._places) + 1
        table = "".join(f"{place:010d} 00000 n \n" for place in self._places)
        trailer = f"trailer << /Size {count} /Root {catalogue} 0 R >>\nstartxref\n{start}\n%%EOF\n"
        self._file.write(f"xref\n0 {count}\n0000000000 65535 f \n{table}{trailer}".encode())

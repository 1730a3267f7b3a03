"""PDF files written by hand, object by object, for the traps that real ones hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HELVETICA = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"


@dataclass(frozen=True)
class Sheet:
    """A page: its content operators (font /F1 is Helvetica), size in points, crop box and rotation."""

    content: str
    width: float = 300
    height: float = 200
    crop: tuple[float, float, float, float] | None = None
    rotate: int = 0


def text(line: str, x: float, y: float, size: float = 12, font: str = "F1", extra: str = "") -> str:
    """Operators that write one line with its baseline at (x, y)."""
    return f"BT {extra} /{font} {size} Tf 1 0 0 1 {x} {y} Tm ({line}) Tj ET\n"


def write(path: Path, *sheets: Sheet, font: tuple[str, ...] = (), trailer: str = "") -> Path:
    """A file of these pages. `font` are the bodies of further objects from number 4 on, the first of them font /F2."""
    second = "/F2 4 0 R" if font else ""
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "",
        f"<< /Font << /F1 {HELVETICA} {second} >> >>",
        *font,
    ]
    kids = []
    for sheet in sheets:
        content = sheet.content.encode("cp1252")
        bodies.append(f"<< /Length {len(content)} >>\nstream\n{sheet.content}\nendstream")
        crop = f"/CropBox [{' '.join(map(str, sheet.crop))}]" if sheet.crop else ""
        box = f"/MediaBox [0 0 {sheet.width} {sheet.height}] {crop} /Rotate {sheet.rotate}"
        bodies.append(f"<< /Type /Page /Parent 2 0 R {box} /Resources 3 0 R /Contents {len(bodies)} 0 R >>")
        kids.append(f"{len(bodies)} 0 R")
    bodies[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    out, places = b"%PDF-1.5\n", []
    for number, body in enumerate(bodies, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("cp1252")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer << /Size {len(bodies) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(out)}\n%%EOF\n"
    path.write_bytes(out + f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}{end}".encode())
    return path


def square_font(codes: dict[str, str]) -> tuple[str, ...]:
    """A font of black squares for the letters a, b, … with the UTF-16 that each stands for, in hexadecimal digits."""
    first, last = ord(min(codes)), ord(max(codes))
    names = " ".join(f"/g{code}" for code in range(first, last + 1))
    glyph = "700 0 0 0 600 700 d1 0 0 600 700 re f"
    lines = "\n".join(f"<{ord(letter):02x}> <{value}>" for letter, value in codes.items() if value)
    mapped = lines.count("\n") + 1 if lines else 0
    to_unicode = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /T def /CMapType 2 def\n"
        f"1 begincodespacerange <00> <ff> endcodespacerange\n{mapped} beginbfchar\n{lines}\nendbfchar\nendcmap end end"
    )
    described = "/ToUnicode 6 0 R" if mapped else ""
    return (
        "<< /Type /Font /Subtype /Type3 /FontBBox [0 0 600 700] /FontMatrix [.001 0 0 .001 0 0] "
        f"/FirstChar {first} /LastChar {last} /Widths [{'700 ' * (last - first + 1)}] "
        f"/CharProcs << {' '.join(f'/g{code} 5 0 R' for code in range(first, last + 1))} >> "
        f"/Encoding << /Differences [{first} {names}] >> {described} >>",
        f"<< /Length {len(glyph)} >>\nstream\n{glyph}\nendstream",
        f"<< /Length {len(to_unicode)} >>\nstream\n{to_unicode}\nendstream",
    )

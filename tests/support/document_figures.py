"""How well real pages are boxed and their readings matched: PDF files of Debian packages, vocabularies of real models.

Run by scripts/others/document_figures.sh. What it fetches stays in the folder that it is given.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from readings import READINGS, Piece, owners_of, read, score
from vocabularies import FOLDER, VOCABULARIES, vocabulary

from sparsemm.chase.matching import can_match, match_aligned, match_unique, normalise, token_texts
from sparsemm.documents.pages import TextBox
from sparsemm.documents.pdf import open_pdf, read_pdf_page
from sparsemm.errors import DataError

FEWEST_WORDS = 150
SECONDS_PER_FETCH = 600


def fetch(package: str, folder: Path) -> list[Path]:
    """The PDF files of a Debian package, downloaded and unpacked where that has not been done."""
    unpacked = folder / "unpacked" / package
    if not unpacked.is_dir():
        archives = folder / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        if not list(archives.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=archives, check=True, timeout=SECONDS_PER_FETCH)
        (archive,) = archives.glob(f"{package}_*.deb")
        part = unpacked.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", archive, part], check=True, timeout=SECONDS_PER_FETCH)
        for packed in part.rglob("*.pdf.gz"):
            packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        part.rename(unpacked)
    return sorted(unpacked.rglob("*.pdf"))


def sample(path: Path, count: int, folder: Path) -> list[tuple[int, list[TextBox]]]:
    """Numbers and words of so many dense pages of a file, drawn by chance; kept in the folder."""
    kept = folder / "pages" / f"{path.parent.parent.name}-{path.stem}-{count}.json"
    if not kept.is_file():
        found = []
        with closing(open_pdf(path)) as document:
            for number in random.Random(0).sample(range(len(document)), len(document)):
                try:
                    _, words = read_pdf_page(document, number, max_pixels=2_000_000)
                except DataError:
                    continue
                if len(words) >= FEWEST_WORDS:
                    found.append((number, [(word.text, word.box) for word in words]))
                if len(found) == count:
                    break
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(found))
    return [
        (number, [TextBox(unicodedata.normalize("NFC", text), tuple(box)) for text, box in words])
        for number, words in json.loads(kept.read_text())
    ]


def lines_of(words: Sequence[TextBox]) -> list[list[Piece]]:
    """The numbered words, a new line where one stands above or below the one before it."""
    lines: list[list[Piece]] = []
    for index, word in enumerate(words):
        last = words[index - 1].box
        if index == 0 or word.box[1] > last[3] or word.box[3] < last[1]:
            lines.append([])
        lines[-1].append((word.text, index))
    return lines


def timed(tokens: Sequence[str], chunks: Sequence[str]) -> tuple[list[int | None], float]:
    """The matches, and the processor's milliseconds for them, the least of three times."""
    took = []
    for _ in range(3):
        start = time.process_time()
        found = match_aligned(tokens, chunks)
        took.append(1000 * (time.process_time() - start))
    return found, min(took)


def reading_table(pages: Sequence[tuple[str, list[TextBox]]]) -> list[list[str]]:
    """Rows of the table of readings: kind, then for each vocabulary matched, wrong, and milliseconds."""
    cells: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    for name in VOCABULARIES:
        tokenizer = vocabulary(name)
        for index, (package, words) in enumerate(pages):
            chunks = [word.text for word in words]
            for kind in READINGS:
                text, owners = read(lines_of(words), kind, seed=index)
                tokens = token_texts(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
                known = owners_of(tokens, owners)
                found, took = timed(tokens, chunks)
                cells[kind, name].append((*score(found, known), took))
                if kind == "true":
                    cells["true, unique", name].append((*score(match_unique(tokens, chunks), known), np.nan))
                    matchable = sum(can_match(normalise(token)) for token in tokens)
                    others[name] += [
                        sum(one is not None for one in match_aligned(tokens, [word.text for word in other])) / matchable
                        for elsewhere, other in pages
                        if elsewhere != package
                    ]
    rows = []
    for kind in [*READINGS, "true, unique"]:
        row = [kind]
        for name in VOCABULARIES:
            matched, wrong, took = np.transpose(cells[kind, name])
            clock = "" if np.isnan(took).any() else f"{np.median(took):.0f} ({took.max():.0f})"
            row += [f"{matched.mean():.3f}", f"{wrong.mean():.3f}", clock]
        rows.append(row)
    rows.append(["page of another package"])
    for name in VOCABULARIES:
        rows[-1] += ["", f"{np.mean(others[name]):.4f} ({max(others[name]):.3f})", ""]
    found, took = timed(["0"] * 1024, [word.text for word in pages[0][1]])
    rows.append(["`0`, 1,024 times", "", str(sum(one is not None for one in found)), f"{took:.0f}", "", "", ""])
    return rows


def box_table(files: Sequence[tuple[Path, list[int]]]) -> list[list[str]]:
    """For each rotation of the pages at 144 dpi: words, those whose box holds no ink, pixels that boxes are loose."""
    rows = []
    for rotation in (0, 90, 180, 270):
        loose: list[int] = []
        empty = 0
        for path, numbers in files:
            with closing(open_pdf(path)) as document:
                for number in numbers:
                    with closing(document[number]) as page:
                        page.set_rotation((page.get_rotation() + rotation) % 360)
                        width, height = page.get_size()
                    image, words = read_pdf_page(document, number, max_pixels=round(4 * width * height))
                    grey = np.asarray(image.convert("L")).astype(int)
                    for word in words:
                        x0, y0, x1, y1 = map(int, word.box)
                        paper = np.median(grey[max(0, y0 - 3) : y1 + 4, max(0, x0 - 3) : x1 + 4])
                        ys, xs = np.nonzero(abs(grey[y0 : y1 + 1, x0 : x1 + 1] - paper) > 12)
                        if len(xs):
                            loose.append(max(xs.min(), ys.min(), x1 - x0 - xs.max(), y1 - y0 - ys.max()))
                        else:
                            empty += 1
        over = np.mean(np.array(loose) > 2)
        rows.append([str(rotation), f"{len(loose) + empty:,}", str(empty), f"{over:.2%}", str(max(loose))])
    return rows


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", nargs="+", required=True)
    parser.add_argument("--pages", type=int, required=True)
    given = parser.parse_args()
    if not list(FOLDER.glob("*.whl")):
        sys.exit(f"there are no vocabularies in {FOLDER}: make vocabularies")
    given.folder.mkdir(parents=True, exist_ok=True)
    pages, files = [], []
    for package in given.packages:
        for path in fetch(package, given.folder):
            drawn = sample(path, given.pages, given.folder)
            print(f"{package}: {path.name}, {len(drawn)} pages", file=sys.stderr)
            pages += [(package, words) for _, words in drawn]
            files.append((path, [number for number, _ in drawn]))
    characters = np.median([sum(len(word.text) for word in words) for _, words in pages])
    print(f"{len(pages)} pages of {len(files)} files, median {characters:,.0f} characters\n")
    heads = ["read as", *(head for name in VOCABULARIES for head in (f"{name}: matched", "wrong", "ms (most)"))]
    print(markdown(heads, reading_table(pages)), end="\n\n")
    print(markdown(["turned by", "words", "without ink", "loose by over 2 px", "by at most"], box_table(files)))


if __name__ == "__main__":
    main()

"""The text layers of PDF pages: boxes that hold the ink, and what real files do to those who read them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny_pdf import Sheet, square_font, text, write

pytest.importorskip("pypdfium2")

from sparsemm.documents.pages import TextBox  # noqa: E402
from sparsemm.documents.pdf import LARGEST_DPI, Character, open_pdf, read_pdf_page, text_boxes  # noqa: E402
from sparsemm.errors import DataError  # noqa: E402


def read(path: Path, number: int = 0, max_pixels: int = 1_000_000, **options):
    with closing(open_pdf(path)) as document:
        return read_pdf_page(document, number, max_pixels=max_pixels, **options)


def texts(path: Path, **options) -> list[str]:
    return [word.text for word in read(path, **options)[1]]


PARAGRAPH = (
    text("The quick, brown fox", 20, 150)
    + text("jumps", 40, 120, 18)
    + text("over lazy dogs.", 150, 20, 7)
    + text("Agyp", 240, 175, 24)
)


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [None, (10, 5, 298, 198)])
def test_boxes_hold_the_ink_of_their_words_and_no_more(tmp_path, rotate, crop):
    path = write(tmp_path / "a.pdf", Sheet(PARAGRAPH, rotate=rotate, crop=crop))
    # 144 dpi, as many pixels as the page has at twice its size in points.
    width, height = (300, 200) if crop is None else (288, 193)
    image, words = read(path, max_pixels=4 * width * height)
    assert sorted(image.size) == sorted((2 * width, 2 * height))
    assert [word.text for word in words] == "The quick, brown fox jumps over lazy dogs. Agyp".split()
    ink = np.asarray(image.convert("L")) < 100
    for word in words:
        x0, y0, x1, y1 = map(int, word.box)
        inside = ink[y0 : y1 + 1, x0 : x1 + 1]
        ys, xs = np.nonzero(inside)
        assert max(ys.min(), xs.min(), y1 - y0 - ys.max(), x1 - x0 - xs.max()) <= 2, word
        ink[max(0, y0 - 1) : y1 + 2, max(0, x0 - 1) : x1 + 2] = False
    assert not ink.any(), "ink that no word's box holds"


def test_units(tmp_path):
    path = write(tmp_path / "a.pdf", Sheet(text("one two", 20, 150) + text("three", 20, 120)))
    assert texts(path, unit="word") == ["one", "two", "three"]
    assert texts(path, unit="line") == ["one two", "three"]
    assert texts(path, unit="character") == list("onetwothree")
    boxes = {unit: read(path, unit=unit)[1] for unit in ("word", "line")}
    assert boxes["line"][0].box[0] == boxes["word"][0].box[0] and boxes["line"][0].box[2] == boxes["word"][1].box[2]


def test_a_hyphen_at_a_line_s_end_is_a_hyphen_and_ends_the_word(tmp_path):
    path = write(tmp_path / "a.pdf", Sheet(text("an exam-", 20, 150) + text("ple of it", 20, 136)))
    assert texts(path) == ["an", "exam-", "ple", "of", "it"]


def test_characters_beyond_the_basic_plane_are_whole_and_half_ones_are_left_out(tmp_path):
    font = square_font({"a": "D83DDE00", "b": "0062", "c": "D83D"})
    path = write(tmp_path / "a.pdf", Sheet(text("ab", 20, 150, font="F2")), font=font)
    (word,) = read(path)[1]
    assert word.text == "\U0001f600b"
    half = write(tmp_path / "b.pdf", Sheet(text("b" * 200 + "c", 20, 150, 2, font="F2")), font=font)
    ("".join(texts(half))).encode("utf-8")


def test_a_layer_without_unicode_values_is_no_text(tmp_path):
    path = write(
        tmp_path / "a.pdf", Sheet(text("abcabc", 20, 150, font="F2")), font=square_font(dict.fromkeys("abc", ""))
    )
    with pytest.raises(DataError, match="no Unicode value"):
        read(path)


@pytest.mark.parametrize("unmapped", [1, 2])
def test_a_character_in_a_hundred_may_lack_its_value(tmp_path, unmapped):
    line = "b" * (100 - unmapped) + "c" * unmapped
    font = square_font({"b": "0062", "c": ""})
    path = write(tmp_path / "a.pdf", Sheet(text(line, 20, 150, 3, font="F2")), font=font)
    if unmapped == 1:
        assert texts(path) == ["b" * 99]
    else:
        with pytest.raises(DataError, match="2 of 100 characters"):
            read(path)


def test_what_the_page_does_not_show_has_no_box(tmp_path):
    content = (
        text("shown", 20, 150)
        + text("cropped", 20, 20)
        + text("across", 20, 45)
        + text("white", 150, 150, extra="1 g")
        + text("unpainted", 150, 120, extra="0 g 3 Tr")
    )
    path = write(tmp_path / "a.pdf", Sheet(content, crop=(0, 50, 300, 200)))
    assert texts(path) == ["shown"]


def test_pages_without_text_have_no_words(tmp_path):
    path = write(tmp_path / "a.pdf", Sheet("0 0 50 50 re f"), Sheet(""))
    assert texts(path) == [] and texts(path, number=1) == []


def test_ligatures_and_accents_are_as_they_are_read(tmp_path):
    path = write(tmp_path / "a.pdf", Sheet(text("caf\xe9 na\xefve \xbd", 20, 150)))
    assert texts(path) == ["caf\xe9", "na\xefve", "\xbd"]


def test_a_glyph_of_two_letters_is_both_of_them(tmp_path):
    font = square_font({"a": "00660069", "b": "0074"})
    (word,) = read(write(tmp_path / "a.pdf", Sheet(text("bab", 20, 150, font="F2")), font=font))[1]
    assert word.text == "tfit"


def test_words_of_scripts_without_spaces_end_with_punctuation_and_script():
    line = [
        Character(char, (10.0 * place, 0.0, 10.0 * place + 9, 10.0))
        for place, char in enumerate("打开，然后用apt安装。")
    ]
    assert [word.text for word in text_boxes(line, "word")] == ["打开，", "然后用", "apt", "安装。"]
    assert [word.text for word in text_boxes(line, "line")] == ["打开，然后用apt安装。"]


def test_what_stands_elsewhere_is_another_word():
    near, far = [(0, 0, 5, 8), (6, 0, 11, 8)], [(60, 0, 65, 8), (0, 40, 5, 48)]
    line = [Character(char, tuple(map(float, box))) for char, box in zip("abcd", near + far, strict=True)]
    assert [word.text for word in text_boxes(line, "word")] == ["ab", "c", "d"]
    assert text_boxes(line, "word")[0] == TextBox("ab", (0, 0, 11, 8))


@pytest.mark.parametrize(("size", "limit"), [((300, 200), 50_000), ((14_400, 14_400), 400_000), ((14_400, 20), 10_000)])
def test_pictures_stay_within_the_limit_however_large_the_page(tmp_path, size, limit):
    place = (0.1 * size[0], 0.4 * size[1])
    sheet = Sheet(text("word", *place, size=0.3 * size[1]), width=size[0], height=size[1])
    image, words = read(write(tmp_path / "a.pdf", sheet), max_pixels=limit)
    assert image.width * image.height <= limit * 1.02 + image.width + image.height
    assert abs(image.width / image.height / (size[0] / size[1]) - 1) < 0.3
    x0, y0, x1, y1 = words[0].box
    assert abs(x0 / image.width - 0.1) < 0.05 and 0 <= y0 <= y1 < image.height


def test_small_pages_are_not_blown_up(tmp_path):
    image, _ = read(write(tmp_path / "a.pdf", Sheet(PARAGRAPH)), max_pixels=10**9)
    assert image.size == (round(300 * LARGEST_DPI / 72) + 1, round(200 * LARGEST_DPI / 72))


@pytest.mark.parametrize(("count", "whole"), [(2, 2), (4, 4)])
def test_crops_show_every_word_whole_and_larger(tmp_path, count, whole):
    lines = [
        text(f"left{row:02d}", 20, 10 + 9 * row, 6) + text(f"right{row:02d}", 200, 10 + 9 * row, 6) for row in range(20)
    ]
    path = write(tmp_path / "a.pdf", Sheet("".join(lines)))
    all_words = {word.text: word.box for word in read(path, max_pixels=20_000)[1]}
    found: dict[str, tuple[float, ...]] = {}
    for index in range(count):
        image, words = read(path, max_pixels=20_000, crop=(index, count))
        assert image.width * image.height <= 20_600
        assert all(0 <= word.box[0] and word.box[2] < image.width for word in words)
        found |= {word.text: word.box for word in words}
    assert found.keys() == all_words.keys() and len(found) == 40
    heights = [(box[3] - box[1] + 1) / (all_words[name][3] - all_words[name][1] + 1) for name, box in found.items()]
    assert np.mean(heights) > 0.8 * np.sqrt(whole)


ENCRYPTED = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'ab' * 32}> /U <{'cd' * 32}> >> /ID [<00> <00>]"


def test_files_that_cannot_be_opened_are_data_errors(tmp_path):
    encrypted = write(tmp_path / "a.pdf", Sheet(PARAGRAPH), trailer=ENCRYPTED)
    broken = tmp_path / "b.pdf"
    broken.write_bytes(b"%PDF-1.5\nnothing else")
    for path in (encrypted, broken, tmp_path / "missing.pdf"):
        with pytest.raises(DataError, match=path.name):
            open_pdf(path)

"""Readers and writers of annotation formats, on small files of each format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sparsemm.chase.matching import match_unique
from sparsemm.datasets import FORMATS, WRITERS, BoxedImage, convert, open_pages
from sparsemm.datasets.base import bounding_box, box_of_extent
from sparsemm.datasets.hub import HubPages
from sparsemm.datasets.registry import recognise
from sparsemm.documents import split_of
from sparsemm.documents.pages import TextBox, sound_words
from sparsemm.errors import DataError


def picture(path: Path, colour: str = "white", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def boxes(page) -> list[tuple[str, tuple[float, ...]]]:
    return [(word.text, word.box) for word in page.words]


# -- published formats ------------------------------------------------------------------------------------------------


def test_mlt_quads_text_with_commas_and_dont_care(tmp_path):
    picture(tmp_path / "images" / "img_2.jpg", "red")
    picture(tmp_path / "images" / "img_10.png", "blue")
    # As published: byte-order mark, Windows line ends, a quad that is no rectangle, commas in the text.
    lines = ["10,5,30,7,29,15,9,12,Latin,Fax: 1,234", "1,1,2,1,2,2,1,2,None,###", "0,20,9,20,9,28,0,28,Arabic,سلام"]
    (tmp_path / "gt_img_2.txt").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    (tmp_path / "gt_img_10.txt").write_text("1,2,3,2,3,4,1,4,Korean,서울\n")
    pages = list(open_pages(tmp_path, images=tmp_path / "images"))
    assert [page.name for page in pages] == ["img_2.jpg", "img_10.png"]  # by number, not by spelling
    assert boxes(pages[0]) == [("Fax: 1,234", (9, 5, 30, 15)), ("سلام", (0, 20, 9, 28))]
    assert boxes(pages[1]) == [("서울", (1, 2, 3, 4))]
    assert pages[1].image.getpixel((0, 0)) == (0, 0, 255)


def test_mlt_2019_names_its_files_like_the_images(tmp_path):
    picture(tmp_path / "tr_img_00001.jpg")
    (tmp_path / "tr_img_00001.txt").write_text("1,2,3,2,3,4,1,4,Latin,a\n", encoding="utf-8")
    (page,) = open_pages(tmp_path)
    assert (page.name, boxes(page)) == ("tr_img_00001.jpg", [("a", (1, 2, 3, 4))])


def test_mlt_errors_name_file_and_line(tmp_path):
    picture(tmp_path / "img_1.jpg")
    (tmp_path / "gt_img_1.txt").write_text("1,2,3,2,3,4,1,4,Latin,ok\n1,2,3\n")
    with pytest.raises(DataError, match=r"gt_img_1\.txt, line 2"):
        open_pages(tmp_path)
    (tmp_path / "gt_img_1.txt").write_text("1,2,3,2,x,4,1,4,Latin,ok\n")
    with pytest.raises(DataError, match="line 1.*coordinates"):
        open_pages(tmp_path)
    (tmp_path / "gt_img_7.txt").write_text("")
    (tmp_path / "gt_img_1.txt").write_text("")
    with pytest.raises(DataError, match="no image img_7"):
        open_pages(tmp_path)


CTW = {
    "image_id": "0000172",
    "file_name": "0000172.jpg",
    "width": 40,
    "height": 30,
    "annotations": [
        [
            {
                "adjusted_bbox": [5, 4, 6, 8],
                "attributes": ["raised"],
                "is_chinese": True,
                "polygon": [[5.5, 4.0], [11.0, 4.5], [10.5, 12.0], [5.0, 11.5]],
                "text": "金",
            },
            {"adjusted_bbox": [12, 5, 6, 8], "is_chinese": True, "text": "属"},
        ],
        [{"polygon": [[1, 20], [4, 20], [4, 28], [1, 28]], "is_chinese": False, "text": "A", "attributes": []}],
        [],
    ],
    "ignore": [{"bbox": [0, 0, 3, 3], "polygon": [[0, 0], [3, 0], [3, 3], [0, 3]]}],
}


def test_ctw_lines_and_characters(tmp_path):
    picture(tmp_path / "0000172.jpg")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(CTW, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (page,) = open_pages(path)
    assert boxes(page) == [("金属", (5, 4, 17, 12)), ("A", (1, 20, 4, 28))]
    (page,) = open_pages(path, unit="character")
    assert boxes(page) == [("金", (5, 4, 11, 12)), ("属", (12, 5, 17, 12)), ("A", (1, 20, 4, 28))]
    assert page.image.size == (40, 30)
    with pytest.raises(DataError, match="unit='word'"):
        open_pages(path, unit="word")


def test_ctw_errors_name_the_line(tmp_path):
    path = tmp_path / "train.jsonl"
    for bad in ("{", '{"file_name": "a.jpg"}', '{"file_name": "a.jpg", "annotations": [[{"text": "a"}]]}'):
        path.write_text(json.dumps(CTW) + "\n" + bad + "\n")
        with pytest.raises(DataError, match="line 2"):
            open_pages(path)


def coco_document() -> dict:
    return {
        "info": {},
        "images": [{"id": 7, "file_name": "000007.jpg", "width": 40, "height": 30}, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [3.0, 4.0, 10.0, 5.0], "iscrowd": 0, "area": 50.0},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0.0, 0.0, 39.0, 30.0], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [20.5, 2.25, 0.5, 3.0], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }


def test_coco_category_names_are_the_text(tmp_path):
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(coco_document()))
    picture(tmp_path / "images" / "000007.jpg")
    pages = list(open_pages(path, images=tmp_path / "images"))
    # A box of width 10 that begins at pixel 3 ends with pixel 12.
    assert boxes(pages[0]) == [("dog", (3, 4, 12, 8)), ("person", (20.5, 2.25, 20.5, 4.25))]
    assert boxes(pages[1]) == []
    document = coco_document()
    document["annotations"][0]["category_id"] = 5
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="5"):
        open_pages(path)


def test_plain_json_and_the_release_s_names_in_it(tmp_path):
    picture(tmp_path / "1.png")
    entries = [
        {"image": "1.png", "words": [{"text": "date", "box": [1, 2, 3, 4]}]},
        {"id": 3, "image_name": "1.png", "2_coord": [{"chunk": "total", "coord": [[5, 6], [9, 8]]}]},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": entries}))
    pages = list(open_pages(tmp_path))
    assert [boxes(page) for page in pages] == [[("date", (1, 2, 3, 4))], [("total", (5, 6, 9, 8))]]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert boxes(list(open_pages(tmp_path / "list.json", limit=1))[0]) == [("date", (1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"pages": []}, "neither a list"),
        ([{"image": "1.png"}], "image 0"),
        ([{"image": "1.png", "words": [{"text": "a"}]}], "image 0, entry 0"),
        ([{"image": "1.png", "words": [{"text": "a", "box": [1, 2, 3]}]}], "two or more"),
        ([{"image": "1.png", "words": [{"text": "a", "box": [1, 2, 3, None]}]}], "coordinates"),
        ([{"image": "../1.png", "words": []}], "lies outside"),
    ],
)
def test_plain_json_errors(tmp_path, document, message):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        open_pages(path, format="plain")


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthdog(tmp_path_factory) -> Path:
    """A folder in the schema of the published set: further columns, boxes of two points in pixels."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    coords = {"chunk": datasets.Value("string"), "coord": [[datasets.Value("int64")]]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "ground_truth": datasets.Value("string"),
            "2_coord": [coords],
            "2_coord_norm": [{**coords, "coord": [[datasets.Value("float64")]]}],
        }
    )
    rows = [
        {
            "image": Image.new("RGB", (40 + index, 30)),
            "ground_truth": "{}",
            "2_coord": [{"chunk": f"word{index}", "coord": [[1, 2], [10, 9]]}],
            "2_coord_norm": [{"chunk": f"word{index}", "coord": [[0.025, 0.06], [0.25, 0.3]]}],
        }
        for index in range(5)
    ]
    folder = tmp_path_factory.mktemp("synthdog")
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize("place", ["data", "data/train-00000-of-00001.parquet", "saved"])
def test_synthdog_schema_from_folder_parquet_and_disk(synthdog, place):
    pages = open_pages(synthdog / place, limit=3)
    assert isinstance(pages, HubPages)
    read = list(pages)
    assert [boxes(page) for page in read] == [[(f"word{index}", (1, 2, 10, 9))] for index in range(3)]
    assert [page.image.size for page in read] == [(40, 30), (41, 30), (42, 30)]
    assert [page.name for page in pages] == ["train-000000", "train-000001", "train-000002"]  # can be read again


def test_number_of_rows_is_known_where_the_files_say(synthdog):
    assert len(open_pages(synthdog / "saved")) == 5
    assert len(open_pages(synthdog / "data" / "train-00000-of-00001.parquet", limit=2)) == 2
    with pytest.raises(TypeError):
        len(open_pages(synthdog / "data"))


def test_missing_split_and_column_are_told(synthdog, tmp_path):
    with pytest.raises(DataError, match="split 'test'"):
        open_pages(synthdog / "data", split="test")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": ["a"], "text": ["b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 2_coord"):
        open_pages(tmp_path / "a.parquet")


# -- opening and converting -------------------------------------------------------------------------------------------


def test_unknown_sources_are_errors(tmp_path):
    for source in ("nowhere", "./no/where", tmp_path / "no.json"):
        with pytest.raises(DataError, match="does not exist"):
            open_pages(source)
    assert recognise("nnethercott/synthdog-en-detection") == "synthdog"
    with pytest.raises(DataError, match="format='voc'"):
        open_pages(tmp_path, format="voc")
    with pytest.raises(DataError, match="no option unit"):
        picture(tmp_path / "1.png")
        (tmp_path / "boxes.json").write_text("[]")
        open_pages(tmp_path, unit="line")
    with pytest.raises(DataError, match="limit=0"):
        open_pages(tmp_path, limit=0)


def test_a_folder_without_any_of_the_images_is_an_error_one_missing_image_is_not(tmp_path):
    entries = [{"image": name, "words": [{"text": "a", "box": [0, 0, 5, 5]}]} for name in ("1.png", "2.png")]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="none of the 2 images .*1.png.; give --images"):
        open_pages(tmp_path)
    picture(tmp_path / "2.png")
    assert len(open_pages(tmp_path)) == 2


def test_broken_images_are_errors_only_when_looked_at(tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    for page in (BoxedImage("1.png", tmp_path / "1.png", []), BoxedImage("row 1", b"no image", [])):
        with pytest.raises(DataError, match="cannot be read"):
            _ = page.image


@pytest.mark.parametrize("target", sorted(WRITERS))
def test_every_format_survives_a_round_trip(tmp_path, target):
    pytest.importorskip("pypdfium2")
    marked = [Image.new("RGB", size, colour) for size, colour in (((60, 40), "red"), ((50, 50), "blue"))]
    for image in marked:
        image.paste("white", (6, 7, 8, 9))  # text boxes of a PDF hold something
    pages = [
        BoxedImage("a", marked[0], [TextBox("one, two", (1, 2, 30, 9)), TextBox("三", (5, 6, 7, 8))]),
        BoxedImage("broken", b"", []),
        BoxedImage("b", marked[1], [TextBox("three", (0, 0, 49, 49))]),
    ]
    folder = tmp_path / "out"
    assert convert(pages, folder, target, progress=False) == (2, 1, {})
    read = list(open_pages(folder, **({"unit": "line"} if target == "pdf" else {})))
    assert recognise(str(folder)) == target and target in FORMATS
    assert [boxes(page) for page in read] == [boxes(page) for page in (pages[0], pages[2])]
    assert [page.image.getpixel((3, 3)) for page in read] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(DataError, match="not an empty folder"):
        convert(pages, folder, target, progress=False)


def test_mlt_cannot_hold_every_text(tmp_path):
    page = BoxedImage("a", Image.new("RGB", (9, 9)), [TextBox("two\nlines", (0, 0, 1, 1))])
    with pytest.raises(DataError, match="cannot be written"):
        convert([page], tmp_path / "out", "mlt", progress=False)


def test_boxes_of_points_and_extents():
    assert bounding_box([[3, 4], [1, 9], [5, 2]], "x") == (1, 2, 5, 9)
    assert bounding_box(["3", "4", "1", "2"], "x") == (3, 4, 1, 2)
    for bad in ([1, 2, 3], [1, 2, float("nan"), 4], "ab", None, [[1], [2], [3]]):
        with pytest.raises(DataError, match="^x"):
            bounding_box(bad, "x")
    assert box_of_extent([1, 2, 1, 0], "x") == (1, 2, 1, 2)
    for bad in ([1, 2, 3], [1, 2, -1, 4], [1, 2, 3, float("inf")], None):
        with pytest.raises(DataError, match="^x"):
            box_of_extent(bad, "x")


# -- generators -------------------------------------------------------------------------------------------------------


def test_generators_make_the_page_asked_for():
    pages = open_pages("documents", limit=3, seed=5, size=(200, 300), unit="word")
    assert len(pages) == 3 and pages[2].image.size == (200, 300)
    assert boxes(pages[2]) == boxes(open_pages("documents", limit=9, seed=5, size=(200, 300), unit="word")[2])
    lines = open_pages("documents", limit=3, seed=5, size=(200, 300))[2]
    assert " ".join(text for text, _ in boxes(lines)) == " ".join(text for text, _ in boxes(pages[2]))
    miniature = open_pages("miniature", limit=4, num_words=(2,))
    assert [len(page.words) for page in miniature] == [2, 2, 2, 2]
    training = open_pages("miniature", limit=4, num_words=(2,), fonts="train")
    assert all(split_of(word.text) == "train" for page in training for word in page.words)
    assert all(split_of(word.text) == "heldout" for page in miniature for word in page.words)
    with pytest.raises(IndexError):
        _ = miniature[4]


@pytest.mark.parametrize(
    "options",
    [{"unit": "character"}, {"num_words": (1,)}, {"strength": 2.0}, {"colour": "red"}, {"size": 10}, {"fonts": "none"}],
)
def test_options_that_a_generator_does_not_have(options):
    with pytest.raises(DataError):
        open_pages("documents", limit=1, **options)
    with pytest.raises(DataError):
        open_pages("miniature", limit=1, unit="word")


def test_words_of_a_generated_page_can_match_uniquely():
    page = open_pages("documents", limit=1, unit="word", size=(600, 800))[0]
    texts = [word.text for word in page.words]
    found = match_unique(texts, texts)
    assert all(index is None or texts[index] == text for index, text in zip(found, texts, strict=True))
    assert sum(index is not None for index in found) > len(texts) / 3


# -- folders, and what is wrong with boxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["plain", "ctw", "coco", "mlt", "synthdog"])
def test_a_folder_that_holds_one_annotation_file_is_enough(tmp_path, target):
    page = BoxedImage("a", Image.new("RGB", (60, 40), "red"), [TextBox("one", (1, 2, 30, 9))])
    convert([page], tmp_path / "out", target, progress=False)
    (read,) = open_pages(tmp_path / "out")
    assert boxes(read) == boxes(page)
    (again,) = open_pages(tmp_path / "out", format=target)
    assert boxes(again) == boxes(page)


def test_a_folder_of_several_annotation_files_is_not_guessed_at(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError):
        open_pages(tmp_path, format="plain")


def test_flawed_words_are_mended_or_left_out_and_counted(tmp_path):
    words = [
        TextBox("good", (1, 1, 9, 9)),
        TextBox(" ", (1, 1, 9, 9)),
        TextBox("inverted", (9, 8, 2, 3)),
        TextBox("negative", (-4, 1, 9, 9)),
        TextBox("beyond", (50, 1, 59, 9)),
        TextBox("before", (-9, 1, -2, 9)),
        TextBox("wide", (1, 1, 60, 9)),
    ]
    kept, flaws = sound_words(words, (40, 30))
    assert [word.text for word in kept] == ["good", "inverted", "negative", "wide"]
    assert kept[1].box == (2, 3, 9, 8)
    assert flaws == {"no text": 1, "inverted box": 1, "outside the image": 2, "across the image's edge": 2}
    page = BoxedImage("a", Image.new("RGB", (40, 30)), words)
    assert convert([page], tmp_path / "out", "plain", progress=False) == (1, 0, flaws)
    assert sound_words(words[:1], (40, 30)) == ([words[0]], {})


def test_bytes_of_a_data_set_s_images_are_read_as_they_are_shown(tmp_path):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes()):
        assert BoxedImage("turned", source, []).image.size == (30, 40)

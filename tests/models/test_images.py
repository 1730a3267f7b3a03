"""`open_image`: what a person sees in the file is what the model gets."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from toy_models import toy_model, toy_processor

from sparsemm.errors import DataError
from sparsemm.models import family_of
from sparsemm.models.images import open_image

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((20, 30, 3), dtype=np.uint8)
    upright[:5, :10] = 255  # white at the upper left
    # How a camera stores an upright picture under each orientation: the inverse of what a viewer does.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    for source in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        assert np.array_equal(np.asarray(open_image(source)), upright)
    once = open_image(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(open_image(once)), upright)  # not turned a second time


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], RAMP)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_value_of_sixteen_bits_is_rounded(mode: str) -> None:
    values = np.arange(65536, dtype={"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")).reshape(256, 256)
    grey = np.asarray(open_image(Image.frombytes(mode, (256, 256), values.tobytes())))[..., 0]
    # 65535 = 255 * 257: what lies nearest, as integers
    assert np.array_equal(grey, (values.astype(np.int64) + 128) // 257)


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_floats_are_scaled(tmp_path: Path, scale: float) -> None:
    Image.fromarray((RAMP * scale).astype(np.float32)).save(tmp_path / "f.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "f.tif"))[..., 0], RAMP)


def test_thirty_two_bits(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.int32) * 257).save(tmp_path / "i.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "i.tif"))[..., 0], RAMP)
    for brightest in (65536, 2**31 - 1):  # more than 16 bits hold: white is the largest number of 32
        grey = np.asarray(open_image(Image.fromarray(np.array([[0, brightest]], dtype=np.int32))))[0, :, 0]
        assert grey.tolist() == [0, round(255 * brightest / (2**31 - 1))]


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 1e6], [0.0, float("nan")]])
def test_floats_of_no_known_range_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="no known range"):
        open_image(Image.fromarray(np.array([values], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    picture.putpixel((1, 0), (10, 10, 10, 255))
    picture.convert(mode).save(tmp_path / "a.png")
    found = np.asarray(open_image(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 1].tolist() == [10, 10, 10]


def test_the_first_frame_of_an_animation_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, logger="sparsemm"):
        assert np.asarray(open_image(tmp_path / "a.gif")).max() == 10
        moved = Image.open(tmp_path / "a.gif")
        moved.seek(1)
        assert np.asarray(open_image(moved)).max() == 10
    assert "2 frames" in caplog.text


def test_data_uris_go_the_same_way(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png")
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    assert np.array_equal(np.asarray(open_image(uri))[..., 0], RAMP)


@pytest.mark.parametrize("family", ["qwen2-vl", "llava-mistral"])
def test_every_way_into_a_prompt_turns_a_photo(tmp_path: Path, family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif, path = Image.Exif(), tmp_path / "photo.png"
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    def pixels(image: object, prompt: object = "read") -> torch.Tensor:
        return family_of(model).build_inputs(processor, [image], [prompt])["pixel_values"]

    expected = pixels(upright)
    for given in (path, str(path), Image.open(path), path.read_bytes(), uri):
        assert torch.equal(pixels(given), expected), type(given)
    for name, given in (("image", Image.open(path)), ("image", str(path)), ("path", str(path)), ("url", uri)):
        content = [{"type": "image", name: given}, {"type": "text", "text": "read"}]
        assert torch.equal(pixels(None, [{"role": "user", "content": content}]), expected), name


def test_no_image_comes_in_another_way() -> None:
    """Pillow's own reading stands where a picture that was just made is taken up again, and nowhere else."""
    root = Path(__file__).resolve().parents[2]
    found = [path for room in ("sparsemm", "lmms-eval") for path in root.glob(f"{room}/**/*.py")]
    opening = {path.relative_to(root).as_posix() for path in found if "Image.open(" in path.read_text()}
    assert opening == {"sparsemm/models/images.py", "sparsemm/documents/photo.py"}


@pytest.mark.parametrize("make", ["text", "truncated", "folder", "missing"])
@pytest.mark.parametrize("lenient", [False, True])  # lmms-eval makes Pillow so
def test_what_is_no_image_is_an_error_of_ours(tmp_path: Path, monkeypatch: Any, make: str, lenient: bool) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / "page.png"
    if make == "text":
        path.write_text("hello")
    elif make == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:500])
    elif make == "folder":
        path.mkdir()
    with pytest.raises(DataError, match="page.png"):
        open_image(path)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES

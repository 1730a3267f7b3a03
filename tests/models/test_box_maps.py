"""Boxes of full-size checkpoints: a painted rectangle against the image tokens whose pixels it changes.

No model is needed: the processors cut the image up, transformers' `unpad_image` crops LLaVA-NeXT's grid.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from toy_models import toy_processor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, Qwen2VLConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sparsemm.models.geometry import ImageLayout, cells_of_box
from sparsemm.models.llava import LLAVA as LLAVA_15
from sparsemm.models.llava_next import LLAVA_NEXT
from sparsemm.models.qwen2_vl import QWEN2_VL, _limit_pixels

LLAVA = LlavaNextConfig(
    vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
    text_config=LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1),
)
PINPOINTS = [tuple(pinpoint) for pinpoint in LLAVA.image_grid_pinpoints]  # (height, width)
CELL = 28  # pixels of a Qwen2-VL image token, after resizing


def images(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """A grey picture of (width, height), and the same with `box` painted white, both corners included."""
    plain = Image.new("RGB", size, (90, 90, 90))
    painted = plain.copy()
    ImageDraw.Draw(painted).rectangle(box, fill=(255, 255, 255))
    return plain, painted


@pytest.mark.parametrize(
    ("size", "shown"),
    [((672, 336), (168, 0, 504, 336)), ((100, 200), (0, 50, 100, 150)), ((1000, 500), (250, 0, 750, 500))],
)
def test_a_picture_is_shown_from_its_middle(size: tuple[int, int], shown: tuple[int, int, int, int]) -> None:
    """LLaVA-1.5 without padding: what is painted beside the middle square is not seen, all of the square is."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_center_crop=True
    )
    left, top, right, bottom = shown
    plain, painted = images(size, (left, top, right - 1, bottom - 1))
    beside = Image.new("RGB", size, (255, 255, 255))
    beside.paste(plain.crop(shown), (left, top))
    before, inside, outside = (image_processor(each, return_tensors="pt") for each in (plain, painted, beside))
    assert (before["pixel_values"] == outside["pixel_values"])[..., 8:-8, 8:-8].all()  # resampling blurs an edge
    assert (before["pixel_values"] != inside["pixel_values"]).all()
    config = LlavaConfig(vision_config=LLAVA.vision_config, text_config=LLAVA.text_config)
    layout = LLAVA_15.image_layout(config, before, SimpleNamespace(image_processor=image_processor), size)
    assert layout.grids == {"grid": (24, 24)} and layout.regions == {"grid": shown}


@pytest.mark.parametrize(
    ("size", "shown"),
    [((672, 336), (0, -168, 672, 504)), ((100, 201), (-50, 0, 151, 201)), ((336, 336), (0, 0, 336, 336))],
)
def test_a_padded_picture_stands_in_the_middle(size: tuple[int, int], shown: tuple[int, int, int, int]) -> None:
    """LLaVA-1.5 with padding to a square: all that the picture covers of the square changes with it, nothing else."""
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_pad=True
    )
    before, after = (
        image_processor(Image.new("RGB", size, colour), return_tensors="pt") for colour in ("black", "white")
    )
    left, top, right, bottom = shown
    scale = 336 / (right - left)
    x0, y0 = round(-left * scale), round(-top * scale)
    x1, y1 = round((size[0] - left) * scale), round((size[1] - top) * scale)
    changed = (before["pixel_values"] != after["pixel_values"])[0].all(0)
    assert changed[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].all()  # resampling blurs an edge
    changed[max(y0 - 4, 0) : y1 + 4, max(x0 - 4, 0) : x1 + 4] = False
    assert not changed.any()
    config = LlavaConfig(vision_config=LLAVA.vision_config, text_config=LLAVA.text_config)
    layout = LLAVA_15.image_layout(config, before, SimpleNamespace(image_processor=image_processor), size)
    assert layout.grids == {"grid": (24, 24)} and layout.regions == {"grid": shown}


def llava_changes(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[Tensor, ImageLayout]:
    """By how much each high-resolution cell changes, `[rows, cols]`, and the layout."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )
    before, after = (processor(image, return_tensors="pt") for image in images(size, box))
    height, width = select_best_resolution([size[1], size[0]], PINPOINTS)
    difference = (after["pixel_values"] - before["pixel_values"])[0].abs()
    tiles_down, tiles_across = height // 336, width // 336
    tiles = difference[1 : 1 + tiles_down * tiles_across].amax(1)  # the first tile is the base view
    cells = tiles.unflatten(-1, (24, 14)).unflatten(-3, (24, 14)).amax((2, 4))
    grid = cells.view(tiles_down, tiles_across, 24, 24).transpose(1, 2).reshape(tiles_down * 24, tiles_across * 24)
    grid = unpad_image(grid[None], (size[1], size[0]))[0]
    (layout,) = LLAVA_NEXT.image_layouts(LLAVA, {"image_sizes": torch.tensor([[size[1], size[0]]])})
    return grid, layout


def qwen_changes(
    size: tuple[int, int], box: tuple[int, int, int, int], min_pixels: int | None, max_pixels: int | None
) -> tuple[Tensor, ImageLayout]:
    """By how much each merged cell changes, `[rows, cols]`, and the layout."""
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    _limit_pixels(processor, min_pixels, max_pixels)
    before, after = (processor(image, return_tensors="pt") for image in images(size, box))
    assert torch.equal(before["image_grid_thw"], after["image_grid_thw"])
    flags = (after["pixel_values"] - before["pixel_values"]).abs().amax(-1).view(-1, 4).amax(-1)
    (layout,) = QWEN2_VL.image_layouts(Qwen2VLConfig(), after)
    return flags.view(layout.grids["grid"]), layout


def check(
    grid: Tensor, layout: ImageLayout, size: tuple[int, int], box: tuple[int, int, int, int], *, exact: bool
) -> None:
    """Changed cells are those of the box's tokens; around its edge up to one more where it was resized."""
    rows, cols = layout.grids[layout.main_part]
    assert grid.shape == (rows, cols)
    left, top, right, bottom = cells_of_box(box, size, (rows, cols))
    inside = torch.zeros(rows, cols, dtype=torch.bool)
    inside[top : bottom + 1, left : right + 1] = True
    # The tokens named for the box are those cells, wherever they stand in the sequence.
    named = torch.isin(layout.columns, layout.tokens_in_box(box, size))
    of_part = torch.tensor([part == layout.main_part for part in layout.parts])
    found = torch.zeros(rows, cols, dtype=torch.bool)
    found[layout.rows[named & of_part], layout.cols[named & of_part]] = True
    assert torch.equal(found, inside)
    changed = grid > 0.1 * grid.max()
    if exact:
        assert torch.equal(changed, inside), (box, changed.nonzero().tolist())
        return
    # Cells smaller than pixels: resampling spreads an edge over up to three of the image's pixels.
    down, across = (max(1, math.ceil(3 * cells / extent)) for cells, extent in ((rows, size[1]), (cols, size[0])))
    around = torch.zeros(rows, cols, dtype=torch.bool)
    around[max(0, top - down) : bottom + down + 1, max(0, left - across) : right + across + 1] = True
    core = torch.zeros(rows, cols, dtype=torch.bool)
    core[top + 1 : bottom, left + 1 : right] = True
    assert not (changed & ~around).any() and not (core & ~changed).any() and (changed & inside).any()


def boxes(size: tuple[int, int], seed: int, count: int = 3) -> list[tuple[int, int, int, int]]:
    """Random boxes that cover at least a cell, so that resizing cannot hide them."""
    rng = np.random.default_rng(seed)
    width, height = size
    found = []
    for _ in range(count):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        extent = rng.uniform(0.06, 0.5, size=2) * size
        found.append((x, y, min(width - 1, x + int(extent[0])), min(height - 1, y + int(extent[1]))))
    return found


@pytest.mark.parametrize("pinpoint", PINPOINTS, ids=str)
def test_every_pinpoint_of_llava_next(pinpoint: tuple[int, int]) -> None:
    height, width = pinpoint
    for box in boxes((width, height), seed=height + width):
        grid, layout = llava_changes((width, height), box)
        check(grid, layout, (width, height), box, exact=True)
    # Smaller and larger images of the same shape, which may take another resolution; one that is padded.
    for scale, stretch in ((0.4, 1.0), (1.7, 1.0), (0.93, 1.06)):
        size = round(width * scale * stretch), round(height * scale)
        if stretch > 1:
            assert tuple(select_best_resolution([size[1], size[0]], PINPOINTS)) == pinpoint
        for box in boxes(size, seed=size[0], count=2):
            grid, layout = llava_changes(size, box)
            check(grid, layout, size, box, exact=False)


@pytest.mark.parametrize("size", [(20, 12), (24, 24), (900, 60), (50, 800), (2400, 300), (333, 1999)], ids=str)
def test_llava_next_images_smaller_than_the_grid_and_of_extreme_shape(size: tuple[int, int]) -> None:
    for box in boxes(size, seed=sum(size)):
        grid, layout = llava_changes(size, box)
        check(grid, layout, size, box, exact=False)


@pytest.mark.parametrize("size", [(CELL * 20, CELL * 13), (CELL * 7, CELL * 30), (CELL * 2, CELL * 2)], ids=str)
def test_qwen_images_of_whole_cells(size: tuple[int, int]) -> None:
    for box in boxes(size, seed=size[0]):
        grid, layout = qwen_changes(size, box, 4 * CELL**2, 1280 * CELL**2)
        assert (grid.shape[1], grid.shape[0]) == (size[0] // CELL, size[1] // CELL)
        check(grid, layout, size, box, exact=True)


@pytest.mark.parametrize(
    ("size", "min_pixels", "max_pixels"),
    [
        ((30, 20), 256 * CELL**2, None),  # far smaller than its grid
        ((11, 9), 64 * CELL**2, None),
        ((1600, 1200), None, 100 * CELL**2),  # far larger
        ((640, 480), 600 * CELL**2, 700 * CELL**2),
        ((1500, 30), None, None),  # extreme shapes
        ((29, 1900), 100 * CELL**2, 300 * CELL**2),
        ((333, 217), None, None),
    ],
    ids=str,
)
def test_qwen_minimal_and_maximal_pixels(size: tuple[int, int], min_pixels: int | None, max_pixels: int | None) -> None:
    for box in boxes(size, seed=sum(size)):
        grid, layout = qwen_changes(size, box, min_pixels, max_pixels)
        if min_pixels is not None:
            assert grid.numel() * CELL**2 >= min_pixels
        if max_pixels is not None:
            assert grid.numel() * CELL**2 <= max_pixels
        check(grid, layout, size, box, exact=False)


def test_pixel_limits_reach_the_processor() -> None:
    processor = toy_processor("qwen2-vl")
    _limit_pixels(processor.image_processor, 100, 200)
    assert (processor.image_processor.size["shortest_edge"], processor.image_processor.size["longest_edge"]) == (
        100,
        200,
    )

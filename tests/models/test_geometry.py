"""Image tokens lie where the models put them: checked against transformers' own packing, positions and pixels."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from toy_models import IMAGE_ID, toy_inputs, toy_model, toy_processor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from sparsemm.errors import DataError
from sparsemm.models import ImageLayout, family_of
from sparsemm.models.geometry import cells_of_box
from sparsemm.models.llava_next import shown_region, unpadded_grid

# (width, height): square, wide, tall, extreme, one pixel, smaller than the grid, and odd.
SIZES = [(56, 56), (56, 28), (28, 56), (40, 40), (70, 20), (21, 64), (200, 9), (9, 200), (1, 1), (7, 9), (133, 101)]


def random_boxes(size: tuple[int, int], count: int, seed: int = 0) -> list[tuple[float, float, float, float]]:
    rng = random.Random(f"{size}/{seed}")
    boxes = []
    for _ in range(count):
        x0, x1 = sorted(rng.randrange(size[0]) for _ in range(2))
        y0, y1 = sorted(rng.randrange(size[1]) for _ in range(2))
        boxes.append((x0, y0, x1, y1))
    return boxes


@pytest.mark.parametrize("size", SIZES)
def test_box_covers_the_cells_between_its_corner_pixels(size: tuple[int, int]) -> None:
    for grid in ((1, 1), (8, 8), (3, 17), (24, 5)):
        for box in random_boxes(size, 20):
            # Exact integer arithmetic: a pixel's cell is the whole part of pixel * cells / extent.
            expected = (
                box[0] * grid[1] // size[0],
                box[1] * grid[0] // size[1],
                box[2] * grid[1] // size[0],
                box[3] * grid[0] // size[1],
            )
            assert cells_of_box(box, size, grid) == expected


def test_boxes_beyond_the_image_are_clamped() -> None:
    assert cells_of_box((-5, -5, 500, 500), (100, 50), (4, 6)) == (0, 0, 5, 3)
    assert cells_of_box((100, 50, 100, 50), (100, 50), (4, 6)) == (5, 3, 5, 3)


def test_bad_boxes_are_refused() -> None:
    layout = ImageLayout(
        torch.arange(4), ("grid",) * 4, torch.arange(4), torch.zeros(4).long(), {"grid": (4, 1)}, "grid"
    )
    with pytest.raises(DataError, match="ends before it begins"):
        layout.tokens_in_box((5, 0, 4, 1), (10, 10))
    for box in ((0, 0, 1), (0, 0, 1, math.nan), (0, 0, math.inf, 1)):
        with pytest.raises(DataError, match="four finite numbers"):
            layout.tokens_in_box(box, (10, 10))
    with pytest.raises(DataError, match=r"\(0, 10\)"):
        layout.tokens_in_box((0, 0, 1, 1), (0, 10))
    with pytest.raises(DataError, match="'high_res'"):
        layout.tokens_in_box((0, 0, 1, 1), (10, 10), part="high_res")


def pack(model: torch.nn.Module, features: torch.Tensor, size: tuple[int, int], newline: float) -> torch.Tensor:
    """transformers' own packing of features `[tiles, cells of a tile, channels]` of one image of (width, height)."""
    packed, _ = model.model.pack_image_features(
        [features],
        torch.tensor([[size[1], size[0]]]),
        vision_feature_select_strategy="default",
        image_newline=torch.full((features.shape[-1],), newline),
    )
    return packed[0]


@pytest.mark.parametrize("size", SIZES)
def test_llava_layout_is_the_packing_of_transformers(size: tuple[int, int]) -> None:
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    inputs = family_of(model).build_inputs(processor, [Image.new("RGB", size)], ["Read."])
    (layout,) = family_of(model).image_token_layout(model.config, inputs)[0]
    best_rows, best_cols = {
        (28, 56): (4, 8), (56, 28): (8, 4), (56, 56): (8, 8),
    }[tuple(_best_resolution(model.config, size))]  # fmt: skip
    tiles = torch.zeros(1 + best_rows * best_cols // 16, 16, 3)
    tiles[0, :, 0] = 1
    tiles[0, :, 1], tiles[0, :, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    for tile in range(len(tiles) - 1):
        top, left = tile // (best_cols // 4) * 4, tile % (best_cols // 4) * 4
        tiles[1 + tile, :, 0] = 2
        tiles[1 + tile, :, 1], tiles[1 + tile, :, 2] = top + torch.arange(16) // 4, left + torch.arange(16) % 4
    packed = pack(model, tiles, size, newline=-1.0)
    parts = [{1: "base", 2: "high_res", -1: "newline"}[int(kind)] for kind in packed[:, 0]]
    assert parts == list(layout.parts)
    # Of strips thinner than a token, transformers keeps no high-resolution token at all.
    assert ("high_res" in layout.grids) == ("high_res" in parts) == (layout.main_part == "high_res")
    assert ("high_res" not in parts) == (max(size) == 200)
    assert len(layout.tokens_in_box((0, 0, 0, 0), size)) == 1
    for part in layout.grids:
        of_part = torch.tensor([name == part for name in parts])
        # Unpadding takes the same off both sides: the layout's cells are the packed ones, shifted.
        shift = packed[of_part][0, 1:]
        assert torch.equal(packed[of_part][:, 1] - shift[0], layout.rows[of_part].float())
        assert torch.equal(packed[of_part][:, 2] - shift[1], layout.cols[of_part].float())
    assert torch.equal(layout.columns, (inputs["input_ids"][0] == IMAGE_ID).nonzero().flatten())


def _best_resolution(config: object, size: tuple[int, int]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution([size[1], size[0]], config.image_grid_pinpoints)


def test_llava_grid_at_full_size() -> None:
    """The 7B checkpoints (336-pixel tiles, 14-pixel patches): as many tokens as their processor counts."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
        text_config=LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1),
    )
    processor = toy_processor("llava-vicuna")
    processor.patch_size = 14
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    rng = random.Random(0)
    for _ in range(500):
        width, height = rng.randrange(1, 3000), rng.randrange(1, 3000)
        rows, cols = unpadded_grid(config, (height, width))
        # Without the CLS token that the processor's count includes and the "default" strategy drops.
        assert 576 + rows * (cols + 1) == processor._get_number_of_features(height, width, 336, 336) - 1


@pytest.mark.parametrize("size", SIZES[:-1])
def test_qwen_layout_is_that_of_the_rope_positions(size: tuple[int, int]) -> None:
    if max(size) / min(size) > 200:
        pytest.skip("the processor refuses such images")
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    inputs = family_of(model).build_inputs(
        processor, [Image.new("RGB", size), None], ["Read.", "A longer prompt, no image."]
    )
    (layout,) = family_of(model).image_token_layout(model.config, inputs)[0]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    of_image = positions[:, 0, layout.columns]
    assert torch.equal(of_image[1] - of_image[1].min(), layout.rows)
    assert torch.equal(of_image[2] - of_image[2].min(), layout.cols)
    assert layout.grids["grid"] == (int(layout.rows.max()) + 1, int(layout.cols.max()) + 1)


def changed_tokens(
    family: str, size: tuple[int, int], box: tuple[float, float, float, float], least: float = 0.1
) -> tuple[set, ImageLayout]:
    """Columns of the main part's tokens whose pixels change when `box` is painted into an image, and the layout."""
    model, processor = toy_model(family), toy_processor(family)
    plain = Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8))
    painted = plain.copy()
    ImageDraw.Draw(painted).rectangle(box, fill=(255, 255, 255))
    build = family_of(model).build_inputs
    before, after = build(processor, [plain], ["Read."]), build(processor, [painted], ["Read."])
    (layout,) = family_of(model).image_token_layout(model.config, after)[0]
    difference = (after["pixel_values"] - before["pixel_values"]).abs()
    if family == "qwen2-vl":  # [patches, patch_dim]; the four patches of a token follow each other
        flags = difference.amax(-1).view(-1, 4).amax(-1)
    else:  # [1, tiles, 3, 28, 28] -> 4 x 4 cells a tile, packed as their features are
        cells = difference[0].unflatten(-1, (4, 7)).unflatten(-3, (4, 7)).amax((1, 3, 5)).flatten(1)
        tiles = 1 + math.prod(_best_resolution(model.config, size)) // 28**2
        flags = pack(model, cells[:tiles, :, None], size, newline=0.0)[:, 0]
    # An edge that resampling blurs fades out; what keeps less than a tenth of the contrast is not painted.
    columns = layout.columns[flags > least * flags.max()].tolist()
    main = {
        column for column, part in zip(layout.columns.tolist(), layout.parts, strict=True) if part == layout.main_part
    }
    return set(columns) & main, layout


@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
@pytest.mark.parametrize("size", [(56, 56), (56, 28), (28, 56)])
def test_painted_box_changes_exactly_its_tokens(family: str, size: tuple[int, int]) -> None:
    """Images that need no resizing (multiples of the cell, and of the tile): no pixel leaves its cell."""
    for box in random_boxes(size, 6):
        changed, layout = changed_tokens(family, size, box)
        assert changed == set(layout.tokens_in_box(box, size).tolist())


@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
@pytest.mark.parametrize("size", [(40, 40), (70, 20), (21, 64), (133, 101), (64, 200), (300, 150), (12, 10)])
def test_painted_box_changes_its_tokens_up_to_resampling(family: str, size: tuple[int, int]) -> None:
    """Elsewhere resizing (and LLaVA's padding) moves an edge by less than a cell: what changes lies within one cell of
    the box's tokens, and the box's inner tokens all change."""
    for box in random_boxes(size, 4):
        changed, layout = changed_tokens(family, size, box)
        rows, cols = layout.grids[layout.main_part]
        left, top, right, bottom = cells_of_box(box, size, (rows, cols))
        cell = {
            column: (row, col)
            for column, row, col in zip(
                layout.columns.tolist(), layout.rows.tolist(), layout.cols.tolist(), strict=True
            )
        }
        for column in changed:
            row, col = cell[column]
            assert top - 1 <= row <= bottom + 1 and left - 1 <= col <= right + 1, (box, row, col)
        inside = layout.tokens_in_box(box, size).tolist()
        for column in inside:
            row, col = cell[column]
            if top < row < bottom and left < col < right:
                assert column in changed, (box, row, col)
        assert changed & set(inside)


def test_the_exact_grid_is_the_pixels_that_tokens_show() -> None:
    """By hand: 100 x 56 pixels fit into 56 x 56 as 56 x 32 (ceil of 31.36), 12 pixels of padding above and below.

    8 rows of 7 pixels less (8 - 4.48 floored to 4) // 2 = 2 above and 2 below leave pixels 14 to 42, of which the
    picture's are 2 to 30 of 32.
    """
    config = copy.deepcopy(toy_model("llava-vicuna").config)
    config.image_grid_pinpoints = [[56, 56]]
    assert unpadded_grid(config, (56, 100)) == (4, 8)
    left, top, right, bottom = shown_region(config, (56, 100))
    assert (left, right) == (0, 100) and (top, bottom) == pytest.approx((2 * 56 / 32, 30 * 56 / 32))


@pytest.mark.parametrize("size", [(133, 101), (64, 200), (200, 64), (300, 150), (91, 200), (70, 25)])
def test_painted_stripes_change_just_the_tokens_of_the_exact_grid(size: tuple[int, int]) -> None:
    """Where the picture is enlarged or shrunk, too: cells that a box only just reaches may keep their colour."""
    model, processor = toy_model("llava-vicuna"), toy_processor("llava-vicuna")
    inputs = family_of(model).build_inputs(processor, [Image.new("RGB", size)], ["Read."])
    ((layout,),) = family_of(model).image_token_layout(model.config, inputs, exact_grid=True)
    (rows, cols), (left, top, right, bottom) = layout.grids["high_res"], layout.regions["high_res"]
    width, height = (right - left) / cols, (bottom - top) / rows
    for row, col in {(0, 0), (rows // 2, cols // 2), (rows - 1, cols - 1)}:
        middle = left + (col + 0.5) * width, top + (row + 0.5) * height
        box = tuple(round(centre + side) for side in (-1, 1) for centre in middle)
        clipped = max(box[0], 0), max(box[1], 0), min(box[2], size[0] - 1), min(box[3], size[1] - 1)
        changed, _ = changed_tokens("llava-vicuna", size, clipped, least=0.5)
        (token,) = layout.tokens_in_box(box, size).tolist()
        assert changed == {token}, (row, col)


def test_base_part_covers_the_whole_image_in_its_own_grid() -> None:
    model, processor = toy_model("llava-mistral"), toy_processor("llava-mistral")
    inputs = family_of(model).build_inputs(processor, [Image.new("RGB", (80, 40))], ["Read."])
    (layout,) = family_of(model).image_token_layout(model.config, inputs)[0]
    first = int(layout.columns[0])
    assert layout.tokens_in_box((0, 0, 79, 39), (80, 40), part="base").tolist() == list(range(first, first + 16))
    assert layout.tokens_in_box((40, 0, 59, 9), (80, 40), part="base").tolist() == [first + 2]
    whole = layout.tokens_in_box((0, 0, 79, 39), (80, 40)).tolist()
    assert len(whole) == 4 * 8 and whole[0] == first + 16 and whole[8] == first + 16 + 9


@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
def test_several_images_a_row_and_padding(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    sizes = [[(56, 28), (28, 56)], [], [(16, 16)]]
    images = [[Image.new("RGB", size) for size in row] or None for row in sizes]
    inputs = family_of(model).build_inputs(processor, images, ["Compare.", "Hello, how are you?", "Read."])
    layouts = family_of(model).image_token_layout(model.config, inputs)
    assert [len(row) for row in layouts] == [2, 0, 1]
    for row, row_layouts in enumerate(layouts):
        found = [column for layout in row_layouts for column in layout.columns.tolist()]
        assert found == (inputs["input_ids"][row] == IMAGE_ID).nonzero().flatten().tolist()
    grids = [layout.grids[layout.main_part] for layout in layouts[0]]
    assert grids[0][0] < grids[0][1] and grids[1][0] > grids[1][1]


@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
def test_tokens_that_do_not_fit_the_images_are_refused(family: str) -> None:
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    layout = family_of(model).image_token_layout
    short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    short["input_ids"][0, (short["input_ids"][0] == IMAGE_ID).nonzero()[0]] = 5
    with pytest.raises(DataError, match="row 0"):
        layout(model.config, short)
    none = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 5)}
    with pytest.raises(DataError, match="2 images were given"):
        layout(model.config, none)

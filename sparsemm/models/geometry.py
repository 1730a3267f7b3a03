"""Where the image tokens of a prompt lie on the image (spec section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsemm.errors import DataError

Box = Sequence[float]
"""(x0, y0, x1, y1) in pixels of the original image, both corners included."""

Inputs = Mapping[str, Tensor]
"""What a processor makes of images and text, by name."""

Region = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the original image; a padded grid reaches beyond it."""


def entries(inputs: Inputs, name: str) -> list[Any]:
    """What the inputs say of each image under `name`, as Python numbers; nothing where there is no image."""
    return inputs[name].tolist() if name in inputs else []


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one image, in sequence order.

    Attributes:
        columns: Index of each token in its row of `input_ids`, padding counted; int64 `[num_tokens]`.
        parts: Name of each token's part, such as "grid", "tiles", "thumbnail", "base", "high_res", "newline".
        rows, cols: Cell of each token in its part's grid, int64 `[num_tokens]`. A newline has the row that it ends and
            the column after the last.
        grids: (rows, columns) of each part that is a grid.
        main_part: The part that boxes are looked up in, unless another is asked for.
        regions: The pixels that a part's grid covers; the whole image where it is not named.
    """

    columns: Tensor
    parts: tuple[str, ...]
    rows: Tensor
    cols: Tensor
    grids: Mapping[str, tuple[int, int]]
    main_part: str
    regions: Mapping[str, Region] = field(default_factory=dict)
    _members: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.parts)

    def tokens_in_box(self, box: Box, image_size: tuple[int, int], *, part: str | None = None) -> Tensor:
        """Columns (sorted int64) of the tokens whose cells `box` touches; none where it lies outside the part's region.

        A pixel lies in cell floor(x * cells / width) of the region, clamped to the grid; the box covers the cells from
        that of (x0, y0) to that of (x1, y1), both included (spec section 5).

        Args:
            box: (x0, y0, x1, y1) in pixels of the original image.
            image_size: (width, height) of the original image, as `PIL.Image.Image.size`.
            part: A key of `grids`; `main_part` by default.

        Raises:
            DataError: The box is not four finite, ordered numbers, the size is not positive, or there is no such part.
        """
        part = self.main_part if part is None else part
        if part not in self.grids:
            raise DataError(f"no image part {part!r}; this layout has {', '.join(self.grids)}")
        cells = cells_of_box(box, image_size, self.grids[part], self.regions.get(part))
        if cells is None:
            return self.columns[:0]
        first_col, first_row, last_col, last_row = cells
        inside = (self.rows >= first_row) & (self.rows <= last_row) & (self.cols >= first_col) & (self.cols <= last_col)
        if part not in self._members:
            self._members[part] = torch.tensor([name == part for name in self.parts])
        return self.columns[inside & self._members[part]]


def grid_layout(num_rows: int, num_cols: int, *, frames: int = 1, region: Region | None = None) -> ImageLayout:
    """One grid, row by row; of a video one after the other."""
    rows, cols = grid_cells(num_rows, num_cols)
    return ImageLayout(
        columns=torch.arange(frames * num_rows * num_cols),
        parts=("grid",) * (frames * num_rows * num_cols),
        rows=rows.repeat(frames),
        cols=cols.repeat(frames),
        grids={"grid": (num_rows, num_cols)},
        main_part="grid",
        regions={} if region is None else {"grid": region},
    )


def base_layout(side: int, num_rows: int, num_cols: int) -> ImageLayout:
    """`side` x `side` base tokens, then high-resolution rows, each closed by a newline token (LLaVA-NeXT, OneVision).

    A strip thinner than one high-resolution row or column has none of these; boxes are then looked up in the base.
    """
    base_rows, base_cols = grid_cells(side, side)
    # The newline of a row stands in the column after the last.
    rows, cols = grid_cells(num_rows, num_cols + 1)
    parts = ("base",) * len(base_rows) + tuple("newline" if col == num_cols else "high_res" for col in cols.tolist())
    grids = {"high_res": (num_rows, num_cols)} if num_rows * num_cols else {}
    return ImageLayout(
        columns=torch.arange(len(parts)),
        parts=parts,
        rows=torch.cat([base_rows, rows]),
        cols=torch.cat([base_cols, cols]),
        grids={**grids, "base": (side, side)},
        main_part="high_res" if grids else "base",
    )


def tiled_layout(
    tile_rows: int,
    tile_cols: int,
    side: int,
    overview: str,
    *,
    overview_first: bool = False,
    region: Region | None = None,
) -> ImageLayout:
    """Tiles of `side` x `side` tokens, tile by tile, and the whole image as part `overview` behind or before them.

    A single tile is the whole image and has no overview; no tile at all leaves the overview alone. The tiles cover
    `region`, by default the whole image.
    """
    rows, cols = grid_cells(side, side)
    across, down = grid_cells(tile_rows, tile_cols)
    all_rows = [row * side + rows for row in across.tolist()]
    all_cols = [col * side + cols for col in down.tolist()]
    tokens = len(all_rows) * side * side
    grids = {"tiles": (tile_rows * side, tile_cols * side)} if tokens else {}
    parts = ("tiles",) * tokens
    if tile_rows * tile_cols != 1:
        begin = 0 if overview_first else len(all_rows)
        all_rows.insert(begin, rows)
        all_cols.insert(begin, cols)
        grids[overview] = (side, side)
        whole = (overview,) * (side * side)
        parts = whole + parts if overview_first else parts + whole
    return ImageLayout(
        columns=torch.arange(len(parts)),
        parts=parts,
        rows=torch.cat(all_rows),
        cols=torch.cat(all_cols),
        grids=grids,
        main_part="tiles" if tokens else overview,
        regions={} if region is None else {"tiles": region},
    )


def cells_of_box(
    box: Box, image_size: tuple[int, int], grid: tuple[int, int], region: Region | None = None
) -> tuple[int, int, int, int] | None:
    """First column, first row, last column, last row of the cells of a (rows, columns) `grid` that `box` touches.

    `region` is what the grid covers, by default the whole image, whose outermost cells also take what reaches beyond
    it. None when the box lies outside a given region. Raises `DataError` for a box that is not four finite, ordered
    numbers, or a size that is not positive.
    """
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise DataError(f"box {tuple(box)!r} is not four finite numbers (x0, y0, x1, y1)")
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise DataError(f"box {tuple(box)!r} ends before it begins; give (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
    width, height = image_size
    if width <= 0 or height <= 0:
        raise DataError(f"image size {image_size!r} is not (width, height) in pixels")
    left, top, right, bottom = (0, 0, width, height) if region is None else region
    if region is not None and (x1 < left or x0 >= right or y1 < top or y0 >= bottom):
        return None
    num_rows, num_cols = grid
    return (
        _cell(x0 - left, right - left, num_cols),
        _cell(y0 - top, bottom - top, num_rows),
        _cell(x1 - left, right - left, num_cols),
        _cell(y1 - top, bottom - top, num_rows),
    )


def _cell(pixel: float, extent: float, cells: int) -> int:
    return min(max(math.floor(pixel * cells / extent), 0), cells - 1)


def split_images_by_row(input_ids: Tensor, image_token_id: int, counts: Sequence[int]) -> list[list[int]]:
    """Image indices of each row of a batch, given each image's token number in batch order.

    Raises:
        DataError: The image tokens of some row are not those of a whole number of images.
    """
    rows: list[list[int]] = []
    index = 0
    for row, total in enumerate((input_ids == image_token_id).sum(-1).tolist()):
        images: list[int] = []
        while total > 0 and index < len(counts):
            total -= counts[index]
            images.append(index)
            index += 1
        if total != 0:
            raise DataError(f"row {row} holds image tokens that are not those of a whole number of images")
        rows.append(images)
    if index != len(counts):
        raise DataError(f"{len(counts)} images were given, the prompts hold the tokens of {index}")
    return rows


def grid_cells(num_rows: int, num_cols: int) -> tuple[Tensor, Tensor]:
    """Row and column of every cell of a grid, row by row: two int64 `[num_rows * num_cols]`."""
    rows = torch.arange(num_rows).repeat_interleave(num_cols)
    cols = torch.arange(num_cols).repeat(num_rows)
    return rows, cols

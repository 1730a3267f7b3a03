"""Where the image tokens of a prompt lie on the image (spec section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm.errors import DataError

Box = Sequence[float]
"""(x0, y0, x1, y1) in pixels of the original image, both corners included."""


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one image, in sequence order.

    Attributes:
        columns: Index of each token in its row of `input_ids`, padding counted; int64 `[num_tokens]`.
        parts: Name of each token's part: "grid" (Qwen2-VL), or "base", "high_res", "newline" (LLaVA-NeXT).
        rows, cols: Cell of each token in its part's grid, int64 `[num_tokens]`. A newline has the row that it ends and
            the column after the last.
        grids: (rows, columns) of each part that is a grid over the whole image.
        main_part: The part that boxes are looked up in, unless another is asked for.
    """

    columns: Tensor
    parts: tuple[str, ...]
    rows: Tensor
    cols: Tensor
    grids: Mapping[str, tuple[int, int]]
    main_part: str

    def __len__(self) -> int:
        return len(self.parts)

    def tokens_in_box(self, box: Box, image_size: tuple[int, int], *, part: str | None = None) -> Tensor:
        """Columns (sorted int64, at least one) of the tokens whose cells `box` touches.

        A pixel lies in cell floor(x * cells / width), clamped to the grid; the box covers the cells from that of
        (x0, y0) to that of (x1, y1), both included (spec section 5).

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
        first_col, first_row, last_col, last_row = cells_of_box(box, image_size, self.grids[part])
        inside = (self.rows >= first_row) & (self.rows <= last_row) & (self.cols >= first_col) & (self.cols <= last_col)
        inside &= torch.tensor([name == part for name in self.parts])
        return self.columns[inside]


def cells_of_box(box: Box, image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """First column, first row, last column, last row of the cells of a (rows, columns) `grid` that `box` touches."""
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise DataError(f"box {tuple(box)!r} is not four finite numbers (x0, y0, x1, y1)")
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise DataError(f"box {tuple(box)!r} ends before it begins; give (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
    width, height = image_size
    if width <= 0 or height <= 0:
        raise DataError(f"image size {image_size!r} is not (width, height) in pixels")
    num_rows, num_cols = grid
    return (
        _cell(x0, width, num_cols),
        _cell(y0, height, num_rows),
        _cell(x1, width, num_cols),
        _cell(y1, height, num_rows),
    )


def _cell(pixel: float, extent: int, cells: int) -> int:
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

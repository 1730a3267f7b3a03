"""Image layouts proved against the models: paint a box, and see which image tokens change.

The real processor prepares both images. In the vision tower every attention output is set to zero, so that a token
depends on its own pixels only; what of its features changes is what the layout says the box covers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from toy_vlms import TOYS, mistral3_inputs, toy_vlm

import sparsemm
from sparsemm.errors import DataError
from sparsemm.models import family_of
from sparsemm.models.geometry import ImageLayout, cells_of_box

SIZES = [(56, 56), (61, 34), (35, 90), (120, 47), (20, 17), (84, 150)]


@contextmanager
def no_mixing(model: nn.Module) -> Iterator[None]:
    """Vision layers whose attention adds nothing."""
    text = family_of(model).text_model(model)
    inside = {id(module) for module in text.modules()}
    hooks = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if (
            id(module) not in inside
            and last in ("self_attn", "attn", "attention")
            and next(module.parameters(), None) is not None
        ):
            hooks.append(module.register_forward_hook(_zeroed))
    assert hooks, "no attention was found in the vision tower"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeroed(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):
        return (output[0] * 0, *output[1:])
    return output * 0


def image_features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What stands at the image tokens when the language model begins: `[image tokens, hidden_size]`."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = family_of(model).text_model(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), no_mixing(model):
            model(**inputs)
    finally:
        hook.remove()
    return seen[0][inputs["input_ids"] == model.config.image_token_id]


def paint(name: str, size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[ImageLayout, set[int], Tensor]:
    """The layout, the columns of the main part whose features change, and how much every column changes."""
    model, processor = toy_vlm(name)
    family = family_of(model)
    plain = Image.new("RGB", size, (90, 90, 90))
    painted = plain.copy()
    ImageDraw.Draw(painted).rectangle(box, fill=(255, 255, 255))
    before, after = (family.build_inputs(processor, [image], ["Read."]) for image in (plain, painted))
    change = (image_features(model, after) - image_features(model, before)).norm(dim=-1)
    (layout,) = family.image_token_layout(model.config, after, processor=processor, image_sizes=[size])[0]
    assert len(layout) == len(change)
    strong = change > 0.1 * change.max() if float(change.max()) > 0 else torch.zeros_like(change, dtype=torch.bool)
    main = torch.tensor([part == layout.main_part for part in layout.parts])
    return layout, set(layout.columns[strong & main].tolist()), change


def boxes(size: tuple[int, int], count: int) -> list[tuple[int, int, int, int]]:
    draw = random.Random(str(size))
    found = []
    for _ in range(count):
        x0, y0 = draw.randrange(size[0]), draw.randrange(size[1])
        found.append((x0, y0, draw.randrange(x0, size[0]), draw.randrange(y0, size[1])))
    return found


@pytest.mark.parametrize("name", TOYS)
def test_painted_boxes_change_the_tokens_that_the_layout_names(name: str) -> None:
    """Resampling moves an edge by less than a cell: all that changes lies within a cell of the box's own, every inner
    cell changes, and where no token is named next to nothing does."""
    for size in SIZES:
        for box in boxes(size, 3):
            layout, changed, _ = paint(name, size, box)
            grid, region = layout.grids[layout.main_part], layout.regions.get(layout.main_part)
            named = set(layout.tokens_in_box(box, size).tolist())
            cells = cells_of_box(box, size, grid, region)
            place = {
                int(column): (int(row), int(col))
                for column, row, col in zip(layout.columns, layout.rows, layout.cols, strict=True)
            }
            if cells is None:
                assert not named
                continue
            left, top, right, bottom = cells
            for column in changed:
                row, col = place[column]
                assert top - 1 <= row <= bottom + 1 and left - 1 <= col <= right + 1, (size, box, row, col)
            for column in named:
                row, col = place[column]
                if top < row < bottom and left < col < right:
                    assert column in changed, (size, box, row, col)
            assert changed & named or _thinner_than_a_pixel(box, size, grid), (size, box)


def _thinner_than_a_pixel(box: tuple[int, int, int, int], size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """A speck that resizing may wash out."""
    return math.prod((box[i + 2] - box[i] + 1) / size[i] * grid[1 - i] for i in (0, 1)) < 0.5


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_row_major_tiles_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ImageLayout.tokens_in_box

    def row_major(self: ImageLayout, box, image_size, *, part=None):
        rows, cols = self.grids[self.main_part]
        wrong = torch.arange(rows * cols)
        object.__setattr__(self, "rows", torch.cat([wrong // cols, self.rows[rows * cols :]]))
        object.__setattr__(self, "cols", torch.cat([wrong % cols, self.cols[rows * cols :]]))
        return original(self, box, image_size, part=part)

    monkeypatch.setattr(ImageLayout, "tokens_in_box", row_major)
    with pytest.raises(AssertionError):
        test_painted_boxes_change_the_tokens_that_the_layout_names(name)


def test_no_crop_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm.models.llava._shown", lambda image_processor, size: None)
    with pytest.raises(AssertionError):
        test_painted_boxes_change_the_tokens_that_the_layout_names("llava")


@pytest.mark.parametrize("name", TOYS)
def test_families_with_an_exact_grid_say_so(name: str) -> None:
    """Of a picture of an odd shape it is another one than the whole image's, or there is none."""
    try:
        model, processor = toy_vlm(name)
    except ImportError as error:
        pytest.skip(str(error))
    family, size = family_of(model), (120, 47)
    inputs = family.build_inputs(processor, [Image.new("RGB", size)], ["Read."])
    plain, exact = (
        family.image_token_layout(model.config, inputs, processor=processor, image_sizes=[size], exact_grid=exact)[0][0]
        for exact in (False, True)
    )
    assert family.pads_grid == (exact.regions != plain.regions)


def test_mistral3_on_tensors() -> None:
    """Its processor needs torchvision; pixels changed by hand show the same."""
    model, _ = toy_vlm("mistral3")
    family = family_of(model)
    plain = [torch.zeros(3, 42, 70), torch.zeros(3, 28, 28)]
    for x0, y0, x1, y1 in ((0, 0, 13, 13), (20, 15, 40, 41), (69, 41, 69, 41), (5, 20, 60, 25)):
        painted = plain[0].clone()
        painted[:, y0 : y1 + 1, x0 : x1 + 1] = 1.0
        before, after = (mistral3_inputs([image, plain[1]], ["Read.", "Look."]) for image in (plain[0], painted))
        change = (image_features(model, after) - image_features(model, before)).norm(dim=-1)
        ((layout,), (other,)) = family.image_token_layout(model.config, after)
        assert layout.grids == {"grid": (3, 5)} and other.grids == {"grid": (2, 2)}
        columns = torch.cat([layout.columns, torch.full((4,), -1)])  # rows of the batch, one after the other
        named = layout.tokens_in_box((x0, y0, x1, y1), (70, 42))
        assert set(columns[change > 1e-6].tolist()) == set(named.tolist())


def test_a_processor_that_needs_a_missing_package_says_so(tmp_path) -> None:
    """PixtralProcessor imports torchvision, which CPU installations of this project do without."""
    pytest.importorskip("transformers")
    from transformers import Mistral3Config
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is here")
    Mistral3Config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(DataError, match="PixtralProcessor of .* needs a package .*Torchvision"):
        sparsemm.load_model(tmp_path)

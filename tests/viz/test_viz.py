"""Pictures: what they show against independent computations; that they are drawn, by opening the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import FAMILIES, toy_model, toy_processor

import sparsemm
from sparsemm import CompressionConfig, HeadScores
from sparsemm.chase import READ_PROMPT
from sparsemm.errors import ConfigError, DataError, HeadScoreError
from sparsemm.models import family_of
from sparsemm.models.geometry import ImageLayout
from sparsemm.viz.heads import draw_budgets, draw_score_map, draw_sparsity, kv_heads_of
from sparsemm.viz.kept import kept_rows
from sparsemm.viz.overlay import draw_kept, draw_overlays
from sparsemm.viz.page import page_data
from sparsemm.viz.reading import Reading, choose_heads, grid_map, read_with_attention

HEADS = [(0, 0), (1, 3), (1, 1)]
PNG = b"\x89PNG\r\n\x1a\n"


def picture(width: int = 60, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def table(layers: int = 2, heads: int = 4) -> HeadScores:
    return HeadScores(torch.arange(1.0, 1 + layers * heads).view(layers, heads), model="toy", num_kv_heads=2)


def opened(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(PNG)
    return np.asarray(Image.open(path).convert("RGB"))


# -- what heads look at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_chosen_heads_is_that_of_whole_matrices(family: str) -> None:
    model, processor = toy_model(family), toy_processor(family)
    reading = read_with_attention(model, processor, picture(), HEADS, max_new_tokens=6)
    eager = toy_model(family, attn_implementation="eager")
    inputs = family_of(eager).build_inputs(processor, [picture()], [READ_PROMPT])
    (layout,) = family_of(eager).image_token_layout(eager.config, inputs)[0]
    result = eager.generate(**inputs, max_new_tokens=6, output_attentions=True, return_dict_in_generate=True)
    assert reading.weights.shape == (6, len(HEADS), len(layout))
    for step, layers in enumerate(result.attentions):
        for place, (layer, head) in enumerate(HEADS):
            expected = layers[layer][0, head, -1, layout.columns]
            torch.testing.assert_close(reading.weights[step, place], expected, rtol=1e-4, atol=1e-6)
    assert len(reading.tokens) == 6 and reading.heads == HEADS


def hand_layout() -> ImageLayout:
    """A 1 x 2 base, then 2 x 2 high-resolution cells with a newline after each row, as LLaVA-NeXT has them."""
    return ImageLayout(
        columns=torch.arange(5, 13),
        parts=("base", "base", "high_res", "high_res", "newline", "high_res", "high_res", "newline"),
        rows=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]),
        cols=torch.tensor([0, 1, 0, 1, 2, 0, 1, 2]),
        grids={"high_res": (2, 2), "base": (1, 2)},
        main_part="high_res",
    )


def test_grids_leave_newline_tokens_out_and_parts_apart() -> None:
    values = torch.tensor([1.0, 2, 3, 4, 100, 5, 6, 100])
    assert grid_map(hand_layout(), values).tolist() == [[3, 4], [5, 6]]
    assert grid_map(hand_layout(), values, "base").tolist() == [[1, 2]]
    with pytest.raises(DataError, match="newline"):
        grid_map(hand_layout(), values, "newline")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(60, 30), (12, 50)])
def test_every_cell_of_a_map_is_the_token_that_its_middle_lies_in(family: str, size: tuple[int, int]) -> None:
    """Independent of how tokens are ordered: the box of a pixel names one token, whose value must show up there."""
    model, processor = toy_model(family), toy_processor(family)
    inputs = family_of(model).build_inputs(processor, [picture(*size)], [READ_PROMPT])
    (layout,) = family_of(model).image_token_layout(model.config, inputs)[0]
    values = torch.arange(1.0, len(layout) + 1)
    for part, (rows, cols) in layout.grids.items():
        grid = grid_map(layout, values, part)
        for row in range(rows):
            for col in range(cols):
                x, y = (col + 0.5) * size[0] / cols, (row + 0.5) * size[1] / rows
                (column,) = layout.tokens_in_box((x, y, x, y), size, part=part).tolist()
                assert grid[row, col] == values[layout.columns.tolist().index(column)]


def test_sum_over_tokens_and_single_tokens() -> None:
    weights = torch.rand(3, 2, 8)
    reading = Reading(picture(), "?", ["a", "b", "<eos>"], [(0, 0), (0, 1)], weights, hand_layout())
    whole = reading.part_map(None, 1)
    torch.testing.assert_close(whole, sum(reading.part_map(token, 1) for token in range(3)))
    assert reading.text == "ab"


def test_heads_are_chosen_by_name_and_by_score() -> None:
    assert choose_heads(table(), (2, 4), names=["1-0"], top=2, bottom=1) == [(1, 0), (1, 3), (1, 2), (0, 0)]
    assert choose_heads(None, (2, 4), names=["1-0", "1-0"]) == [(1, 0)]
    for bad in ("2-0", "0-4", "0", "a-b", "-1-0"):
        with pytest.raises(ConfigError, match="not layer-head"):
            choose_heads(None, (2, 4), names=[bad])
    with pytest.raises(ConfigError, match="need head scores"):
        choose_heads(None, (2, 4), top=1)
    with pytest.raises(ConfigError, match="no head"):
        choose_heads(table(), (2, 4))
    with pytest.raises(HeadScoreError):
        choose_heads(table(), (3, 4), top=1)


# -- what survives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv", "sparsemm", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_positions_are_those_that_the_cache_keeps(family: str, method: str) -> None:
    """The keys in the compressed cache are those of the full one at the positions that are drawn."""
    model, processor = toy_model(family), toy_processor(family)
    scores = table() if method == "sparsemm" else None
    config = CompressionConfig(method=method, budget=12, window_size=4, head_scores=scores)
    kept = kept_rows(model, processor, picture(), config)
    inputs = family_of(model).build_inputs(processor, [picture()], [READ_PROMPT])

    def stored(config: CompressionConfig) -> list[list[torch.Tensor]]:
        with sparsemm.patch(model, config, reserve=1) as handle, torch.inference_mode():
            cache = handle.new_cache()
            model(**inputs, past_key_values=cache)
        return [
            [layer.key_buffer[o : o + n] for o, n in zip(layer.offsets.tolist(), layer.lens.tolist(), strict=False)]
            for layer in cache.layers
        ]

    everything, selected = stored(CompressionConfig(method="fullkv", budget=None)), stored(config)
    for layer, heads in enumerate(kept.positions):
        for head, positions in enumerate(heads):
            assert torch.equal(selected[layer][head], everything[layer][head][positions])
    assert kept.rows().sum() == 12 * kept.rows().numel()
    assert kept.on_image(0, 0).sum() == sum(int(p) in set(kept.layout.columns.tolist()) for p in kept.positions[0][0])


def test_only_methods_that_compress_can_be_drawn() -> None:
    with pytest.raises(ConfigError, match="keeps every row"):
        kept_rows(toy_model("qwen2-vl"), toy_processor("qwen2-vl"), picture(), CompressionConfig("fullkv", None))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava-mistral", "qwen2-vl"])
def test_every_picture_is_drawn(family: str, tmp_path: Path) -> None:
    model, processor = toy_model(family), toy_processor(family)
    reading = read_with_attention(model, processor, picture(), HEADS, max_new_tokens=3)
    parts = list(reading.layout.grids)
    draw_overlays(reading, tmp_path / "overlay.png", tokens=[None, 0, 2], parts=parts, scores=table())
    config = CompressionConfig(method="snapkv", budget=10, window_size=4)
    kept = kept_rows(model, processor, picture(), config)
    draw_kept(kept, tmp_path / "kept.png")
    draw_kept(kept, tmp_path / "last.png", layers=[1])
    assert opened(tmp_path / "last.png").shape[0] < opened(tmp_path / "kept.png").shape[0]
    with pytest.raises(DataError, match=r"layers \[2\]"):
        draw_kept(kept, tmp_path / "last.png", layers=[2])
    draw_budgets(kept.rows(), tmp_path / "budgets.png", title=kept.describe(), prompt_length=kept.prompt_length)
    draw_score_map(table(), tmp_path / "scores.png", num_kv_heads=2, title="toy")
    draw_sparsity({"a": table(), "b": table(3, 5)}, tmp_path / "sparsity.png", title="toy")
    for name in ("overlay", "kept", "budgets", "scores", "sparsity"):
        pixels = opened(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        first = (tmp_path / f"{name}.png").read_bytes()
        assert len(first) < 2_000_000
    draw_sparsity({"a": table()}, tmp_path / "sparsity.svg")
    assert (tmp_path / "sparsity.svg").read_text().lstrip().startswith("<?xml")


def test_large_models_get_legible_maps(tmp_path: Path) -> None:
    values = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) ** 8
    draw_score_map(HeadScores(values), tmp_path / "a.png", num_kv_heads=8)
    draw_budgets((values[:, :8] * 1000).long(), tmp_path / "b.png")
    assert opened(tmp_path / "a.png").shape[1] > 900 and opened(tmp_path / "b.png").shape[1] > 1200


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(HeadScoreError, match="grouped"):
        draw_score_map(table(), tmp_path / "a.png", num_kv_heads=3)
    with pytest.raises(DataError, match="image format"):
        draw_score_map(table(), tmp_path / "a.docx")
    with pytest.raises(DataError, match="no score table"):
        draw_sparsity({}, tmp_path / "a.png")
    with pytest.raises(DataError, match="num_layers, num_kv_heads"):
        draw_budgets(torch.ones(3), tmp_path / "a.png")
    reading = Reading(picture(), "?", ["a"], [(0, 0)], torch.rand(1, 1, 8), hand_layout())
    with pytest.raises(DataError, match="token 1"):
        draw_overlays(reading, tmp_path / "a.png", tokens=[1])
    with pytest.raises(DataError, match="no image part 'grid'"):
        draw_overlays(reading, tmp_path / "a.png", parts=["grid"])
    assert not list(tmp_path.iterdir())
    assert kv_heads_of(table(), None) == 2 and kv_heads_of(table(), 4) == 4
    with pytest.raises(HeadScoreError, match="'two'"):
        kv_heads_of(HeadScores([[1.0]], num_kv_heads="two"), None)


def test_page_data_give_the_weights_back() -> None:
    import base64

    weights = torch.rand(3, 2, 8) / 8
    weights[1, 0] = 0
    reading = Reading(picture(), "?", ["a", "b", "</script>"], [(0, 0), (0, 1)], weights, hand_layout())
    data: dict[str, Any] = page_data(reading, HeadScores([[1.0, 3.0]]))
    assert [part["name"] for part in data["parts"]] == ["high_res", "base"]
    assert [head["share"] for head in data["heads"]] == [0.25, 0.75]
    for part in data["parts"]:
        raw = np.frombuffer(base64.b64decode(part["weights"]), np.uint8)
        cells = raw.reshape(3, 2, part["rows"], part["cols"]) / 255 * np.array(data["peaks"])[..., None, None]
        for token in range(3):
            for head in range(2):
                expected = reading.part_map(token, head, part["name"]).numpy()
                np.testing.assert_allclose(cells[token, head], expected, atol=float(weights.max()) / 500)

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
from sparsemm.documents import TextBox
from sparsemm.errors import ConfigError, DataError, HeadScoreError
from sparsemm.head_scores import Curves
from sparsemm.models import family_of
from sparsemm.models.geometry import ImageLayout
from sparsemm.runs.plots import new_figure, save_figure
from sparsemm.viz.calibration import draw_calibration
from sparsemm.viz.heads import draw_budgets, draw_head_rows, draw_score_map, draw_sparsity, kv_heads_of
from sparsemm.viz.kept import KeptRows, kept_rows
from sparsemm.viz.page import page_data
from sparsemm.viz.reading import Reading, choose_heads, grid_map, read_with_attention
from sparsemm.viz.sheets import draw_attention, draw_kept, draw_overlays
from sparsemm.viz.summary import draw_summary

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


def test_mean_over_tokens_and_single_tokens() -> None:
    weights = torch.rand(3, 2, 8)
    reading = Reading(picture(), "?", ["a", "b", "<eos>"], [(0, 0), (0, 1)], weights, hand_layout())
    whole = reading.part_map(None, 1)
    torch.testing.assert_close(whole, sum(reading.part_map(token, 1) for token in range(3)) / 3)
    assert reading.text == "ab"
    other = reading.of_heads([(0, 1)])
    assert other.heads == [(0, 1)] and torch.equal(other.part_map(2, 0), reading.part_map(2, 1))


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


def saved(figure: Any, path: Path) -> np.ndarray:
    save_figure(figure, path)
    return opened(path)


@pytest.mark.parametrize("family", ["llava-mistral", "qwen2-vl"])
def test_every_picture_is_drawn(family: str, tmp_path: Path) -> None:
    model, processor = toy_model(family), toy_processor(family)
    reading = read_with_attention(model, processor, picture(), HEADS, max_new_tokens=3)
    kept = kept_rows(model, processor, picture(), CompressionConfig(method="snapkv", budget=10, window_size=4))
    words = [TextBox(reading.tokens[1], (10, 5, 30, 20))]
    figures = {
        "overlay": draw_overlays(reading, tokens=[None, 0, 2], parts=list(reading.layout.grids), scores=table()),
        "kept": draw_kept(kept, scores=table()),
        "budgets": draw_budgets(kept.rows(), title=kept.describe(), prompt_length=kept.prompt_length),
        "scores": draw_score_map(table(), num_kv_heads=2, title="toy"),
        "sparsity": draw_sparsity({"a": table(), "b": table(3, 5)}, title="toy"),
        "summary": draw_summary(reading, table(), kept, words=words, token=1),
    }
    for name, figure in figures.items():
        pixels = saved(figure, tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert (tmp_path / f"{name}.png").stat().st_size < 2_000_000
    last = saved(draw_kept(kept, layers=[1]), tmp_path / "last.png")
    assert last.shape[0] < opened(tmp_path / "kept.png").shape[0]
    with pytest.raises(DataError, match=r"layers \[2\]"):
        draw_kept(kept, layers=[2])
    with pytest.raises(DataError, match="token 3"):
        draw_summary(reading, table(), kept, token=3)


@pytest.mark.parametrize("further", ["svg", "pdf"])
def test_further_formats_lie_beside_the_picture_and_repeat_byte_for_byte(tmp_path: Path, further: str) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        save_figure(draw_sparsity({"a": table()}), folder / "a.png", further)
        assert {path.name for path in folder.iterdir()} == {"a.png", f"a.{further}"}
    for name in ("a.png", f"a.{further}"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    start = (tmp_path / "one" / f"a.{further}").read_bytes()[:5]
    assert start == {"svg": b"<?xml", "pdf": b"%PDF-"}[further]


@pytest.mark.parametrize(("ground", "ink"), [(255, 0), (0, 255), (200, 60)])
def test_text_keeps_its_contrast_under_any_attention(ground: int, ink: int) -> None:
    """Left half looked at, right half not; a column of text in each."""
    pixels = np.full((20, 40, 3), ground, np.uint8)
    pixels[:, [10, 30]] = ink
    axes = new_figure(2, 1).add_subplot()
    draw_attention(axes, Image.fromarray(pixels), np.array([[0.5, 0.0]]), (0.0, 0.0, 40.0, 20.0))
    drawn = np.asarray(axes.images[0].get_array())
    light, luminance = ground > ink, np.array([0.2126, 0.7152, 0.0722])
    looked_at, text, elsewhere, other_text = drawn[5, 3], drawn[5, 10], drawn[5, 25], drawn[5, 30]
    assert np.ptp(looked_at) > 0.3 and np.ptp(elsewhere) < 0.01, "attention is the only colour"
    np.testing.assert_allclose(elsewhere, 1.0 if light else 0.0, atol=0.01)
    for written, behind in ((text, looked_at), (other_text, elsewhere)):
        brighter, darker = sorted((written @ luminance + 0.05, behind @ luminance + 0.05), reverse=True)
        assert brighter / darker > 1.9
    assert axes.get_xlabel() == "frame 50 %, page 50 %"


def test_frames_lie_around_the_cells_of_the_region() -> None:
    axes = new_figure(2, 1).add_subplot()
    # A 2 x 2 grid over the right half of a 40 x 20 page: its first cell is 10 pixels wide and high, from x = 20.
    draw_attention(axes, picture(40, 20), np.array([[3.0, 1.0], [0.0, 0.0]]), (20.0, 0.0, 40.0, 20.0))
    (frame,) = axes.patches
    corners = {tuple(corner) for corner in frame.get_path().vertices + 0.5}
    assert corners == {(20, 0), (30, 0), (20, 10), (30, 10)} and len(frame.get_path().vertices) == 8
    drawn = np.asarray(axes.images[0].get_array())
    assert np.ptp(drawn[:, :20], axis=-1).max() < 0.01 < np.ptp(drawn[5, 35]), "nothing outside of the region"


def test_long_lists_of_tokens_go_on_below() -> None:
    names = [f"token{number}" for number in range(17)]
    reading = Reading(picture(), "?", names, [(0, 0), (0, 1)], torch.rand(17, 2, 8), hand_layout())
    panels = [axes for axes in draw_overlays(reading, tokens=range(17)).axes if axes.images and axes.axison]
    assert len(panels) == 34
    places = [axes.get_subplotspec() for axes in panels]
    assert len({place.rowspan.start for place in places}) == 6, "17 tokens in lines of 7, both heads in each"
    assert len({place.colspan.start for place in places}) == 7
    assert [axes.get_title() for axes in panels if axes.get_title()] == [f"“{name}”" for name in names]


def test_curve_and_text_count_the_same_heads() -> None:
    tables = {"few": table(4, 8), "many": table(32, 32), "one": table(1, 3)}
    axes = draw_sparsity(tables).axes[0]
    curves = {line.get_label().split(":")[0]: line for line in axes.lines if ":" in line.get_label()}
    for name, scores in tables.items():
        x, y = curves[name].get_data()
        assert curves[name].get_drawstyle() == "steps-post"
        for percent in (0, 1, 5, 10, 29, 50, 100):
            held = y[np.searchsorted(x, percent + 1e-9, side="right") - 1]  # the step that percent lies on
            assert held == pytest.approx(100 * scores.top_share(percent / 100), abs=1e-6)
    assert "5 % = 1 of 32 heads" in curves["few"].get_label() and "51 of 1024" in curves["many"].get_label()
    assert "0 of 3 heads, 0 %" in curves["one"].get_label()


def test_maps_of_changes_have_words_no_minus_zero_and_layer_0_above() -> None:
    change = torch.tensor([[-0.001, 0.004], [-0.2, float("nan")]], dtype=torch.float64)
    figure = draw_head_rows({"Document reading": change, "Field question": change / 2}, title="one head at a time")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["Document reading", "Field question"]
    assert [text.get_text() for text in panels[0].texts] == ["0", "0", "−20"]
    scales = {axes.images[0].get_clim() for axes in panels}
    assert scales == {(-20.0, 20.0)}, "one scale for all tasks"
    for drawn in (figure, draw_score_map(table()), draw_budgets(torch.ones(3, 2))):
        assert all(axes.yaxis_inverted() for axes in drawn.axes if axes.images)


def test_calibrations_are_drawn_with_the_budgets_that_follow(tmp_path: Path) -> None:
    sensitivities = torch.tensor([[1.0, 5.0, 0.5, 0.0], [2.0, 0.1, 0.2, 0.3]])
    curves = Curves([4, 5, 8, 16], sensitivities, torch.linspace(1, 0, 4).expand(2, 4, 4).clone())
    scores = HeadScores(torch.ones(2, 4), curves=curves)
    rows = {"ours": torch.tensor([[4, 30], [5, 6]]), "theirs": torch.full((2, 2), 11)}
    figure = draw_calibration(scores, rows, heads=[(1, 0), (0, 3)], title="toy")
    pixels = saved(figure, tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 400
    panels = [axes for part in figure.subfigs for axes in part.axes]
    curve_axes = next(axes for axes in panels if axes.get_xlabel() == "Rows")
    assert [line.get_label() for line in curve_axes.get_lines()] == ["1-0", "0-3"]
    numbers = [[text.get_text() for text in axes.texts] for axes in panels if axes.get_xlabel() == "kv head"]
    assert numbers == [["4", "30", "5", "6"], ["11"] * 4]
    shares = next([text.get_text() for text in axes.texts] for axes in panels if axes.get_xlabel() == "Query head")
    assert shares[1] == "54.9" and shares[3] == "0.0"
    figure = draw_calibration(scores, rows)
    curve_axes = next(axes for part in figure.subfigs for axes in part.axes if axes.get_xlabel() == "Rows")
    assert [line.get_label() for line in curve_axes.get_lines()][:2] == ["0-1", "1-0"]
    with pytest.raises(DataError, match="head scores only"):
        draw_calibration(table(), rows)
    with pytest.raises(DataError, match="head 2-0 is not one of 2 layers"):
        draw_calibration(scores, rows, heads=[(2, 0)])


def test_summary_shows_the_longest_word_where_the_head_looks_hardest() -> None:
    weights = torch.full((5, 2, 8), 0.01)
    weights[3, 0, 5] = 0.4
    weights[0, 0, 2], weights[2, 0, 4] = 0.9, 0.8  # token 0 is of the shorter word, column 4 a newline
    reading = Reading(picture(), "?", ["ab", " ", "c", "de", "<eos>"], [(0, 0), (1, 1)], weights, hand_layout())
    positions = [[torch.arange(head + 1) for head in range(4)] for _ in range(2)]
    kept = KeptRows(picture(), hand_layout(), positions, 13, CompressionConfig("snapkv", 8, window_size=4))
    words = [TextBox("ab", (0, 0, 9, 9)), TextBox("cde", (20, 3, 50, 25))]
    figure = draw_summary(reading, table(), kept, words=words)
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "ab c" in written and "de" in written
    boxes = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_bbox")]
    assert [box.get_bbox().bounds for box in boxes] == [(17.0, 0.0, 36.0, 28.0)]
    assert "head 0-0" in figure.axes[1].get_xlabel() and "40 % of its attention" in figure.axes[1].get_xlabel()


def test_large_models_get_legible_maps(tmp_path: Path) -> None:
    values = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) ** 8
    assert saved(draw_score_map(HeadScores(values), num_kv_heads=8), tmp_path / "a.png").shape[1] > 900
    assert saved(draw_budgets((values[:, :8] * 1000).long()), tmp_path / "b.png").shape[1] > 1200


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(HeadScoreError, match="grouped"):
        draw_score_map(table(), num_kv_heads=3)
    with pytest.raises(DataError, match="image format"):
        save_figure(draw_score_map(table()), tmp_path / "a.docx")
    with pytest.raises(DataError, match="no score table"):
        draw_sparsity({})
    with pytest.raises(DataError, match="num_layers, num_kv_heads"):
        draw_budgets(torch.ones(3))
    reading = Reading(picture(), "?", ["a"], [(0, 0)], torch.rand(1, 1, 8), hand_layout())
    with pytest.raises(DataError, match="token 1"):
        draw_overlays(reading, tokens=[1])
    with pytest.raises(DataError, match="no image part 'grid'"):
        draw_overlays(reading, parts=["grid"])
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

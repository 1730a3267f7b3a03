"""Rate-distortion budgets against exhaustive search, and what must hold for every calibration."""

from __future__ import annotations

import dataclasses
import itertools

import baselines
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm.cache.selection import select_positions
from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.head_scores import Curves, HeadScores
from sparsemm.methods.rate_distortion import Piece, lower_hull, split_equally
from sparsemm.plan import head_budgets

MANY = settings(max_examples=60, deadline=None, derandomize=True)
ROWS = [4, 5, 6, 8, 11, 16, 23, 32]


def calibration(sensitivities: np.ndarray, distortions: np.ndarray, rows: list[int] = ROWS) -> HeadScores:
    return HeadScores(np.ones(sensitivities.shape), curves=Curves(rows, sensitivities, distortions))


def drawn(seed: int, layers: int, heads: int, kind: str = "noisy", rows: list[int] = ROWS) -> HeadScores:
    """Curves that fall from 1 to 0: smooth, with noise that makes them rise in places, or alike for many heads."""
    generator = np.random.default_rng(seed)
    power = (
        generator.integers(1, 4, (layers, heads, 1)) if kind == "alike" else generator.random((layers, heads, 1)) * 4
    )
    curves = (1 - (np.array(rows) - rows[0]) / (rows[-1] - rows[0])) ** (power + 0.2)
    if kind == "noisy":
        curves = curves * (1 + 0.3 * generator.standard_normal(curves.shape)).clip(0)
    sensitivities = (
        generator.integers(0, 3, (layers, heads)) if kind == "alike" else generator.random((layers, heads)) ** 4
    )
    curves[..., -1] = 0
    return calibration(sensitivities.astype(float), curves, rows)


@st.composite
def cases(draw: st.DrawFn) -> tuple[HeadScores, dict[str, int], int, int]:
    layers, kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    scores = drawn(
        draw(st.integers(0, 2**32 - 1)), layers, kv_heads * group, draw(st.sampled_from(["smooth", "noisy", "alike"]))
    )
    shape = {"num_layers": layers, "num_query_heads": kv_heads * group, "num_kv_heads": kv_heads}
    window = draw(st.integers(4, 7))
    return scores, shape, window, draw(st.integers(window, 50))


def budgets(scores: HeadScores, shape: dict[str, int], window: int, budget: int, length: int) -> torch.Tensor:
    config = CompressionConfig("rate_distortion", budget, scores, window_size=window)
    return head_budgets(config, **shape, prompt_length=length)


@given(cases())
@MANY
def test_sums_are_exact_and_no_head_loses_rows_to_a_larger_budget(case) -> None:
    scores, shape, window, length = case
    before = None
    for budget in range(window, length + 3):
        rows = budgets(scores, shape, window, budget, length)
        assert rows.dtype == torch.long and rows.shape == (shape["num_layers"], shape["num_kv_heads"])
        assert rows.sum() == min(budget, length) * rows.numel()
        assert rows.min() >= window and rows.max() <= length
        assert before is None or (rows >= before).all()
        before = rows


@given(cases())
@settings(MANY, max_examples=40)
def test_budgets_equal_the_reference(case) -> None:
    """The same hulls found by looking at every pair of points, the rows handed out one at a time."""
    scores, shape, window, length = case
    tables = scores.curves.sensitivities.numpy(), scores.curves.distortions.numpy()
    for budget in {window, window + 1, (window + length) // 2, max(window, length - 1)}:
        expected = reference.rate_distortion_budgets(*tables, ROWS, shape["num_kv_heads"], budget, window, length)
        assert budgets(scores, shape, window, budget, length).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [9, 20])
def test_no_other_budgets_lose_less(seed: int, length: int) -> None:
    """Exhaustive search over all ways to share the rows among three heads, errors read off their hulls."""
    scores, rows = drawn(seed, 1, 3), [4, 5, 6, 8, 11, 16, 23, 32]
    shape = {"num_layers": 1, "num_query_heads": 3, "num_kv_heads": 3}
    errors = (scores.curves.sensitivities[..., None] * scores.curves.distortions)[0].numpy()
    hulls = [reference.lower_hull(rows, list(curve)) for curve in errors]

    def lost(share: tuple[int, ...]) -> float:
        return sum(hull(each) for hull, each in zip(hulls, share, strict=True))

    for budget in range(4, length + 1):
        shares = itertools.product(range(4, length + 1), repeat=3)
        best = min(lost(share) for share in shares if sum(share) == 3 * budget)
        found = lost(tuple(budgets(scores, shape, 4, budget, length)[0].tolist()))
        assert found <= best + 1e-12 * max(1.0, best)


def test_equal_savings_go_to_the_lower_layer_then_head() -> None:
    line = np.linspace(1, 0, 5)
    scores = calibration(np.ones((2, 2)), np.tile(line, (2, 2, 1)), [4, 5, 6, 7, 8])
    shape = {"num_layers": 2, "num_query_heads": 2, "num_kv_heads": 2}
    assert budgets(scores, shape, 4, 5, 30).tolist() == [[8, 4], [4, 4]]
    assert budgets(scores, shape, 4, 7, 30).tolist() == [[8, 8], [8, 4]]
    assert budgets(scores, shape, 4, 5, 6).tolist() == [[6, 6], [4, 4]]  # nobody above the prompt's length
    # Beyond the curves nobody gains: the rest is split equally.
    assert budgets(scores, shape, 4, 10, 30).tolist() == [[10, 10], [10, 10]]


def test_heads_that_nothing_depends_on_get_the_rest() -> None:
    assert split_equally(7, [9, 2, 9]) == [3, 2, 2]
    assert split_equally(5, [0, 1, 9, 9]) == [0, 1, 2, 2]
    assert split_equally(0, [3, 3]) == [0, 0] and split_equally(6, [3, 3]) == [3, 3]
    scores = calibration(np.array([[1.0, 0.0]]), np.array([[[1.0, 0.2, 0.0]] * 2]), [4, 8, 12])
    shape = {"num_layers": 1, "num_query_heads": 2, "num_kv_heads": 2}
    assert budgets(scores, shape, 4, 7, 50).tolist() == [[10, 4]]
    assert budgets(scores, shape, 4, 10, 50).tolist() == [[14, 6]]


def test_a_group_shares_its_rows() -> None:
    """Errors of the query heads of a kv head are added."""
    apart = drawn(3, 2, 4)
    errors = apart.curves.sensitivities[..., None] * apart.curves.distortions
    summed = errors.view(2, 2, 2, -1).sum(2)
    joined = calibration(np.ones((2, 2)), summed.numpy())
    whole = {"num_layers": 2, "num_kv_heads": 2}
    for budget in (5, 9, 17):
        grouped = budgets(apart, {**whole, "num_query_heads": 4}, 4, budget, 40)
        assert torch.equal(grouped, budgets(joined, {**whole, "num_query_heads": 2}, 4, budget, 40))


def test_what_cannot_be_answered_is_said() -> None:
    scores = drawn(0, 2, 2)
    with pytest.raises(ConfigError, match="needs head_scores.*sparsemm calibrate"):
        CompressionConfig("rate_distortion", 16)
    with pytest.raises(ConfigError, match="rounding='paper' is how the original release"):
        CompressionConfig("rate_distortion", 16, scores, window_size=4, rounding="paper")
    shape = {"num_layers": 2, "num_query_heads": 2, "num_kv_heads": 2}
    with pytest.raises(HeadScoreError, match="needs a calibration, which `sparsemm calibrate` makes"):
        budgets(HeadScores(torch.ones(2, 2)), shape, 4, 16, 40)
    with pytest.raises(ConfigError, match="window_size=3 is smaller than the 4"):
        budgets(scores, shape, 3, 16, 40)
    with pytest.raises(HeadScoreError, match="the model has 3 x 2"):
        budgets(scores, {**shape, "num_layers": 3}, 4, 16, 40)


def test_a_calibration_serves_where_scores_do() -> None:
    scores = HeadScores(torch.rand(2, 4) + 0.1, curves=drawn(0, 2, 4).curves)
    shape = {"num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "prompt_length": 60}
    plain = HeadScores(scores.values)
    rows = head_budgets(CompressionConfig("sparsemm", 16, scores, window_size=4), **shape)
    assert torch.equal(rows, head_budgets(CompressionConfig("sparsemm", 16, plain, window_size=4), **shape))


def test_positions_are_snapkvs() -> None:
    scores = drawn(1, 2, 4)
    config = CompressionConfig("rate_distortion", 14, scores, window_size=4)
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 4, 40, 8)
    (kept,) = select_positions(query, key, config, layer_idx=1, num_layers=2)
    counts = head_budgets(config, num_layers=2, num_query_heads=4, num_kv_heads=4, prompt_length=40)[1].tolist()
    pooled = reference.pooled_scores(query[0, :, -4:].numpy(), key[0].numpy(), 4, 5, 8**-0.5)
    expected = reference.top_positions(pooled, counts, 4, 40)
    assert [positions.tolist() for positions in kept] == expected.positions


def test_every_head_follows_the_ranking_that_serves_it_better(tmp_path) -> None:
    first, second = drawn(2, 2, 4).curves, drawn(3, 2, 4).curves
    curves = Curves(ROWS, first.sensitivities, first.distortions, distortions_mixkv=second.distortions)
    HeadScores(torch.ones(2, 4), curves=curves).save(tmp_path / "both.json")
    shape = {"num_layers": 2, "num_query_heads": 4, "num_kv_heads": 4}
    config = CompressionConfig("rate_distortion_mixkv", 14, tmp_path / "both.json", window_size=4)
    found = head_budgets(config, **shape, prompt_length=40)
    better = second.distortions.mean(-1) < first.distortions.mean(-1)  # by head, as each query head has its own kv head
    assert better.any() and not better.all()
    smaller = torch.where(better[..., None], second.distortions, first.distortions)
    assert torch.equal(found, budgets(calibration(first.sensitivities, smaller), shape, 4, 14, 40))
    assert not torch.equal(found, budgets(HeadScores.load(tmp_path / "both.json"), shape, 4, 14, 40))
    query, key, value = torch.randn(1, 4, 40, 8), torch.randn(1, 4, 40, 8), torch.randn(1, 4, 40, 8)
    (kept,) = select_positions(query, key, config, layer_idx=1, num_layers=2, value=value)
    pooled = reference.pooled_scores(query[0, :, -4:].numpy(), key[0].numpy(), 4, 5, 8**-0.5)
    mixed = baselines.mixkv(*(each[0].double().numpy() for each in (query, key, value)), 4, 8**-0.5)[:, :36]
    scores = np.where(better[1].numpy()[:, None], mixed, pooled)
    expected = reference.top_positions(scores, found[1].tolist(), 4, 40)
    assert [positions.tolist() for positions in kept] == expected.positions
    with pytest.raises(HeadScoreError, match="needs the curves of MixKV's ranking.*calibrate again"):
        head_budgets(dataclasses.replace(config, head_scores=drawn(2, 2, 4)), **shape, prompt_length=40)


def test_corners_of_a_hull_are_where_savings_fall() -> None:
    assert lower_hull(5, [1, 2, 3, 5], [3.0, 2.0, 1.0, 1.0]) == [Piece(1.0, 5, 1, 3)]
    assert lower_hull(0, [1, 2, 4], [4.0, 3.5, 0.0]) == [Piece(4 / 3, 0, 1, 4)]  # the middle lies above the line
    assert [piece.saving for piece in lower_hull(0, [1, 2, 4], [4.0, 1.0, 0.0])] == [3.0, 0.5]

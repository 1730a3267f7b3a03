"""Budgets against exact rational arithmetic, and what must hold for every configuration."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import METHODS
from sparsemm.methods.adakv import adaptive_budgets
from sparsemm.methods.budgets import (
    fill_in_proportion,
    largest_fraction,
    largest_fraction_on_device,
)
from sparsemm.plan import Plan, head_budgets

MANY = settings(max_examples=1500, deadline=None, derandomize=True)
BY_LENGTH = ["snapkv", "pyramidkv", "sparsemm", "random"]


@dataclasses.dataclass(frozen=True)
class Case:
    config: CompressionConfig
    shape: dict[str, int]
    scores: HeadScores

    @property
    def budgets(self) -> torch.Tensor:
        return head_budgets(self.config, **self.shape)


@st.composite
def cases(draw: st.DrawFn, methods: list[str], rounding: str | None = None) -> Case:
    num_layers, num_kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    group = draw(st.sampled_from([1, 1, 2, 4, 7]))
    window = draw(st.sampled_from([1, 2, 4, 8, 32]))
    budget = window + draw(st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 200)))
    # Lengths around the window and the budget are the interesting ones.
    length = draw(
        st.one_of(
            st.integers(0, 40),
            st.integers(max(0, budget - 2), budget + 2),
            st.integers(budget, 3 * budget),
            st.just(5000),
        )
    )
    table = _score_table(
        draw(st.sampled_from(["counts", "sparse", "equal", "one head", "heavy"])),
        draw,
        num_layers,
        num_kv_heads * group,
    )
    scores = HeadScores(table)
    config = CompressionConfig(
        method=draw(st.sampled_from(methods)),
        budget=budget,
        head_scores=scores,
        window_size=window,
        ratio=draw(st.sampled_from([0.0, 0.1, 0.1, 0.25, 0.3, 0.7, 0.95, 1.0])),
        rounding=rounding or draw(st.sampled_from(["exact", "paper"])),
        pyramid_beta=draw(st.sampled_from([1, 2, 7, 20, 100])),
        seed=draw(st.integers(0, 3)),
    )
    shape = {
        "num_layers": num_layers,
        "num_query_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "prompt_length": length,
    }
    return Case(config, shape, scores)


def _score_table(kind: str, draw: st.DrawFn, num_layers: int, num_heads: int) -> np.ndarray:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_layers, num_heads)
    if kind == "counts":  # integers make exact ties of the fractions common
        table = generator.integers(0, draw(st.sampled_from([2, 4, 50])), shape).astype(float)
    elif kind == "sparse":
        table = generator.random(shape) * (generator.random(shape) < 0.2)
    elif kind == "equal":
        table = np.full(shape, 0.1)
    elif kind == "one head":
        table = np.zeros(shape)
    else:
        table = generator.random(shape) ** 12
    if not table.any():
        table.flat[generator.integers(table.size)] = 1.0
    return table


def expected_budgets(case: Case) -> np.ndarray:
    config, shape = case.config, case.shape
    length, num_kv_heads = shape["prompt_length"], shape["num_kv_heads"]
    if config.method == "snapkv":
        return np.full((shape["num_layers"], num_kv_heads), min(config.budget, length))
    if config.method == "pyramidkv":
        layers = reference.pyramid_budgets(
            shape["num_layers"], config.budget, config.window_size, config.pyramid_beta, length, config.rounding
        )
        return np.repeat(np.array(layers)[:, None], num_kv_heads, axis=1)
    scores = Plan(
        config, *(shape[name] for name in ("num_layers", "num_query_heads", "num_kv_heads"))
    ).head_scores.values.numpy()
    return reference.score_budgets(
        scores, num_kv_heads, config.budget, config.window_size, config.ratio, length, config.rounding
    )


@given(cases(BY_LENGTH, rounding="exact"))
@MANY
def test_exact_budgets_use_all_of_the_memory_and_no_more(case: Case) -> None:
    rows, length = case.budgets, case.shape["prompt_length"]
    assert rows.dtype == torch.long and rows.shape == (case.shape["num_layers"], case.shape["num_kv_heads"])
    assert rows.sum() == min(case.config.budget, length) * rows.numel()
    assert rows.min() >= min(case.config.window_size, length) and rows.max() <= length


@given(cases(BY_LENGTH))
@MANY
def test_budgets_equal_rational_arithmetic(case: Case) -> None:
    assert case.budgets.tolist() == expected_budgets(case).tolist()


@given(cases(BY_LENGTH, rounding="paper"))
@settings(MANY, max_examples=500)
def test_paper_budgets_stay_within_the_prompt_and_hold_the_window(case: Case) -> None:
    rows, length = case.budgets, case.shape["prompt_length"]
    assert rows.min() >= min(case.config.window_size, length) and rows.max() <= length
    if case.config.budget > length:
        assert (rows == length).all()


@given(
    st.lists(st.floats(0, 1e300, allow_subnormal=True), min_size=1, max_size=12).filter(any),
    st.integers(0, 60),
    st.integers(1, 300),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@settings(MANY, max_examples=800)
def test_scores_of_any_size_keep_the_sum(values: list[float], beyond: int, more: int, ratio: float) -> None:
    config = CompressionConfig("sparsemm", 8 + beyond, HeadScores([values]), window_size=8, ratio=ratio)
    count, length = len(values), 8 + beyond + more
    rows = head_budgets(config, num_layers=1, num_query_heads=count, num_kv_heads=count, prompt_length=length)
    assert rows.sum() == config.budget * count and rows.min() >= 8 and rows.max() <= length


def test_a_full_heads_surplus_goes_to_the_others_by_score() -> None:
    # window 4, ratio 0: 4 heads share 4 * 16 = 64 rows; the first may hold 20 beyond its window, 44 are left for 3 : 1.
    config = CompressionConfig("sparsemm", 20, HeadScores([[96, 3], [1, 0]]), window_size=4, ratio=0)
    shape = {"num_layers": 2, "num_query_heads": 2, "num_kv_heads": 2}
    assert head_budgets(config, **shape, prompt_length=37).tolist() == [[37, 27], [12, 4]]
    # At 24 the second is full as well, and the third takes what it can; the head without a score gets the rest.
    assert head_budgets(config, **shape, prompt_length=24).tolist() == [[24, 24], [24, 8]]


def test_ties_go_to_the_lower_layer_then_head() -> None:
    # Twelve rows beyond the windows for scores 3 : 1 : 3 : 1, so 4.5, 1.5, 4.5 and 1.5.
    config = CompressionConfig("sparsemm", 7, HeadScores([[3, 1], [3, 1]]), window_size=4, ratio=0)
    rows = head_budgets(config, num_layers=2, num_query_heads=2, num_kv_heads=2, prompt_length=50)
    assert rows.tolist() == [[9, 6], [8, 5]]
    assert largest_fraction([5] * 8, 4, total=10) == [2, 2, 1, 1, 1, 1, 1, 1]
    numerators = torch.tensor([[5] * 8, [2, 1, 1, 2, 2, 0, 0, 0]])
    rounded = largest_fraction_on_device(numerators, 4)
    assert rounded.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("gap", [0.0, 2.0**-32, 2.0**-52])
def test_no_difference_is_too_small_to_decide(gap: float) -> None:
    """Four rows for scores 1 : 1 + gap : 0 : 1, so 4/3 each: the one left over goes to the first head only in a tie."""
    config = CompressionConfig("sparsemm", 6, HeadScores([[1.0, 1.0 + gap, 0.0, 1.0]]), window_size=5, ratio=0)
    rows = head_budgets(config, num_layers=1, num_query_heads=4, num_kv_heads=4, prompt_length=50)
    assert rows.tolist() == [[6, 7, 5, 6] if gap else [7, 6, 5, 6]]
    thirds = torch.tensor([[10**12, 10**12 + bool(gap), 10**12]])
    assert largest_fraction_on_device(thirds, 3 * 10**12).tolist() == [[0, 1, 0] if gap else [1, 0, 0]]


def test_filling_in_proportion() -> None:
    def filled(total: int, limit: int) -> list[Fraction]:
        parts, unit = fill_in_proportion([1, 6, 0, 3], total=Fraction(total), limit=Fraction(limit))
        return [Fraction(part, unit) for part in parts]

    assert filled(total=10, limit=100) == [1, 6, 0, 3]
    assert filled(total=10, limit=4) == [2, 4, 0, 4]
    assert filled(total=10, limit=5) == [Fraction(5, 4), 5, 0, Fraction(15, 4)]
    assert filled(total=18, limit=5) == [5, 5, 3, 5]
    assert filled(total=0, limit=5) == [0, 0, 0, 0]


@pytest.mark.parametrize("method", BY_LENGTH)
def test_no_jump_where_the_prompt_outgrows_the_budget(method: str) -> None:
    """Exact: with every token more, the rows kept grow by one row a head, then stay; nothing is lost at T = budget."""
    config = CompressionConfig(method, 48, HeadScores(torch.rand(4, 8)), window_size=8)
    totals = [
        head_budgets(config, num_layers=4, num_query_heads=8, num_kv_heads=4, prompt_length=length).sum().item()
        for length in range(40, 60)
    ]
    assert totals == [min(length, 48) * 16 for length in range(40, 60)]


def test_pyramid_budgets_are_those_of_each_prompt() -> None:
    config = CompressionConfig("pyramidkv", 64, window_size=8)
    shape = {"num_layers": 4, "num_query_heads": 2, "num_kv_heads": 2}
    short = head_budgets(config, **shape, prompt_length=80)
    long = head_budgets(config, **shape, prompt_length=1000)
    assert short[:, 0].tolist() == [80, 69, 59, 48] and long[:, 0].tolist() == [118, 82, 46, 10]
    assert torch.equal(short, head_budgets(config, **shape, prompt_length=80))
    assert (long[:, :1] == long).all()


def test_ablation_settings() -> None:
    """Table 2: window only, window + uniform; Table 1: any ratio in [0, 1]."""
    scores = HeadScores(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)))
    shape = {"num_layers": 4, "num_query_heads": 8, "num_kv_heads": 8, "prompt_length": 500}
    for rounding in ("exact", "paper"):
        window_only = CompressionConfig("sparsemm", 64, scores, window_size=64, rounding=rounding)
        assert (head_budgets(window_only, **shape) == 64).all()
        uniform = CompressionConfig("sparsemm", 64, scores, ratio=1, rounding=rounding)
        assert (head_budgets(uniform, **shape) == 64).all()
        spread = [
            head_budgets(CompressionConfig("sparsemm", 64, scores, ratio=r, rounding=rounding), **shape).float().std()
            for r in (0, 0.25, 0.5, 0.75, 1)
        ]
        assert spread == sorted(spread, reverse=True) and spread[0] > spread[-1] == 0


def test_paper_rounding_is_half_to_even_and_loses_capped_rows() -> None:
    # 2 heads, base 5, ratio 0: shares 0.25 and 0.75 of 10 = 2.5 and 7.5, both tied, both to the even neighbour.
    config = CompressionConfig("sparsemm", 6, HeadScores([[1, 3]]), window_size=1, ratio=0, rounding="paper")
    shape = {"num_layers": 1, "num_query_heads": 2, "num_kv_heads": 2}
    assert head_budgets(config, **shape, prompt_length=50).tolist() == [[3, 9]]
    assert head_budgets(config, **shape, prompt_length=6).tolist() == [[3, 6]]  # 3 rows lost: a jump at T = budget
    assert head_budgets(config, **shape, prompt_length=5).tolist() == [[5, 5]]


def test_grouped_heads_share_one_budget() -> None:
    """Metadata is per kv head: scores of a group are added, and the table has Hkv columns."""
    table = torch.rand(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shape = {"num_layers": 3, "num_kv_heads": 2, "prompt_length": 300}
    grouped = head_budgets(CompressionConfig("sparsemm", 64, HeadScores(table)), num_query_heads=8, **shape)
    summed = HeadScores(table.view(3, 2, 4).sum(-1))
    assert torch.equal(grouped, head_budgets(CompressionConfig("sparsemm", 64, summed), num_query_heads=2, **shape))
    assert grouped.shape == (3, 2)


def test_random_is_sparsemm_with_drawn_scores() -> None:
    shape = {"num_layers": 4, "num_query_heads": 8, "num_kv_heads": 4, "prompt_length": 300}
    config = CompressionConfig("random", 64, seed=5)
    drawn = Plan(config, 4, 8, 8).head_scores
    assert torch.equal(head_budgets(config, **shape), head_budgets(CompressionConfig("sparsemm", 64, drawn), **shape))
    other = CompressionConfig("random", 64, seed=6)
    assert not torch.equal(head_budgets(config, **shape), head_budgets(other, **shape))


@pytest.mark.parametrize("method", ["fullkv", "mask", "mask_random"])
def test_methods_that_keep_everything(method: str) -> None:
    config = CompressionConfig(method, head_scores=HeadScores(torch.ones(2, 4)))
    rows = head_budgets(config, num_layers=2, num_query_heads=4, num_kv_heads=2, prompt_length=77)
    assert rows.tolist() == [[77, 77], [77, 77]]


def test_requests_that_have_no_answer() -> None:
    good: dict[str, Any] = {"num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "prompt_length": 100}
    with pytest.raises(ConfigError, match="adakv.*depend on the attention scores"):
        head_budgets(CompressionConfig("adakv", 64), **good)
    config = CompressionConfig("snapkv", 64)
    for change, message in [
        ({"num_query_heads": 5}, "num_query_heads=5 is not a multiple"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"prompt_length": -1}, "prompt_length=-1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            head_budgets(config, **{**good, **change})
    with pytest.raises(HeadScoreError, match="the model has 2 x 4"):
        head_budgets(CompressionConfig("sparsemm", 64, HeadScores(torch.ones(2, 8))), **good)
    assert set(METHODS) >= {"fullkv", "snapkv", "pyramidkv", "adakv", "sparsemm", "random", "mask", "mask_random"}


# -- AdaKV: budgets of one layer from its scores -----------------------------------------------------------------------


@given(st.data())
@settings(MANY, max_examples=600)
def test_adakv_layer_budgets(data: st.DataObject) -> None:
    draw = data.draw
    batch, heads, base = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 30))
    floor, rounding = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), draw(st.sampled_from(["exact", "paper"]))
    window = 4
    config = CompressionConfig("adakv", window + base, window_size=window, adakv_floor=floor, rounding=rounding)
    columns = base + draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(batch, heads, columns, generator=generator) ** draw(st.sampled_from([1, 8]))
    padding = torch.randint(0, columns - base, (batch, 1), generator=generator).expand(-1, heads)
    valid = torch.arange(columns) >= padding[..., None]
    rows = adaptive_budgets(config, scores, valid)
    assert rows.shape == (batch, heads) and (rows >= 0).all() and (rows <= valid.sum(-1)).all()
    if rounding == "exact":
        assert rows.sum(-1).tolist() == [heads * base] * batch
    for row in range(batch):
        pooled = scores[row, :, int(padding[row, 0]) :].double().numpy()
        length = pooled.shape[1] + window
        expected, margin = reference.adakv_budgets(pooled, window + base, window, floor, length, rounding)
        if base + window < length and margin >= 1e-5:
            assert (rows[row] + window).tolist() == expected


def test_adakv_gives_rows_to_spread_out_heads() -> None:
    concentrated = torch.full((1, 1, 100), 1e-6)
    concentrated[..., :2] = 0.5
    spread = torch.linspace(0.011, 0.009, 100).view(1, 1, 100)
    config = CompressionConfig("adakv", 32 + 20)
    rows = adaptive_budgets(config, torch.cat([concentrated, spread], 1), torch.ones(1, 2, 100, dtype=torch.bool))
    assert rows.tolist() == [[round(0.8 * 2 + 4), 40 - round(0.8 * 2 + 4)]]


@pytest.mark.parametrize("fill", [0.0, 0.25, float("nan")])
def test_adakv_ties_and_broken_scores_still_add_up(fill: float) -> None:
    """The host counts on the sum without asking the device; equal entries go to the lower head."""
    config = CompressionConfig("adakv", 40, window_size=8, adakv_floor=0)
    rows = adaptive_budgets(config, torch.full((2, 4, 70), fill), torch.ones(2, 4, 70, dtype=torch.bool))
    assert rows.tolist() == [[70, 58, 0, 0]] * 2


def test_adakv_with_fewer_rows_than_the_budget_asks_for() -> None:
    """Later turns: heads hold different numbers of rows, maybe fewer than their share."""
    config = CompressionConfig("adakv", 40, window_size=8)
    valid = torch.arange(50) >= torch.tensor([[0, 45, 50]])[..., None]
    rows = adaptive_budgets(config, torch.rand(1, 3, 50, generator=torch.Generator().manual_seed(0)), valid)
    assert (rows <= valid.sum(-1)).all() and rows[0, 2] == 0 and rows[0, 0] > 32

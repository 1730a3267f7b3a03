"""Head scores: both file formats, every refusal, sums in float64, the seeded draw."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError
from sparsemm.head_scores import Curves, HeadScores, heads_of_share
from sparsemm.plan import Plan, head_budgets


def release_document(num_layers: int = 3, num_heads: int = 12) -> dict[str, list[float]]:
    """Two samples a head, means 0.5 * (layer * num_heads + head)."""
    return {
        f"{layer}-{head}": [0.0, float(layer * num_heads + head)]
        for layer in range(num_layers)
        for head in range(num_heads)
    }


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_release_format_is_averaged_normalised_and_read_by_name(tmp_path: Path) -> None:
    document = release_document()
    items = list(document.items())
    random.Random(3).shuffle(items)  # file order: "2-10" may come before "0-1"
    scores = HeadScores.load(write(tmp_path / "shuffled.json", dict(items)))
    expected = torch.arange(36, dtype=torch.float64).view(3, 12)
    torch.testing.assert_close(scores.values, expected / expected.sum(), rtol=1e-14, atol=0)
    assert scores.values.dtype == torch.float64
    assert torch.equal(scores.values, HeadScores.load(write(tmp_path / "ordered.json", document)).values)


def test_release_means_are_over_each_heads_own_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"0-0": [1.0, 2.0, 3.0], "0-1": [6.0]})
    assert HeadScores.load(path).values.tolist() == [[0.25, 0.75]]


def test_our_format_brings_back_values_and_provenance_exactly(tmp_path: Path) -> None:
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 9
    provenance = {"model": "toy", "dataset": "pages", "num_images": 10, "versions": {"torch": "2"}, "seed": 0}
    HeadScores(values, **provenance).save(tmp_path / "new folder" / "scores.json")
    loaded = HeadScores.load(tmp_path / "new folder" / "scores.json")
    assert torch.equal(loaded.values, values) and loaded.provenance == provenance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("1-3"), "head '1-3' is missing"),
        (lambda d: d.pop("0-0"), "head '0-0' is missing"),
        (lambda d: d.update({"1-3": [0.1, float("nan")]}), "'1-3' holds NaN"),
        (lambda d: d.update({"1-3": [0.1, float("inf")]}), "'1-3' holds NaN or infinity"),
        (lambda d: d.update({"1-3": [-0.1, 5.0]}), "'1-3' holds the negative score -0.1"),
        (lambda d: d.update({"1-3": []}), "'1-3' holds .*not a list of one score per sample"),
        (lambda d: d.update({"1-3": ["0.1"]}), "'1-3' holds '0.1', which is not a number"),
        (lambda d: d.update({"1_3": [0.1]}), "'1_3' is not of the form"),
        (lambda d: d.update({"01-3": [0.1]}), "'01-3' is not of the form"),
        (lambda d: d.update({key: [0.0] for key in d}), "all zero"),
    ],
)
def test_bad_release_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    document = release_document()
    change(document)
    with pytest.raises(HeadScoreError, match=message) as caught:
        HeadScores.load(write(tmp_path / "bad.json", document))
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["values"][1].pop(), "a head is missing"),
        (lambda d: d["values"].pop(), "num_layers is 2, but the table has 1"),
        (lambda d: d.pop("values"), "'values' is missing"),
        (lambda d: d["values"][1].__setitem__(2, None), "layer 1, head 2 is None"),
        (lambda d: d["values"][1].__setitem__(2, float("nan")), "NaN or infinity at layer 1, head 2"),
        (lambda d: d["values"][1].__setitem__(2, -1), "negative at layer 1, head 2"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(provenance="me"), "'provenance'"),
    ],
)
def test_bad_files_of_ours_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    HeadScores(torch.ones(2, 3)).save(tmp_path / "good.json")
    document = json.loads((tmp_path / "good.json").read_text())
    change(document)
    with pytest.raises(HeadScoreError, match=message):
        HeadScores.load(write(tmp_path / "bad.json", document))


def test_files_that_are_no_score_files(tmp_path: Path) -> None:
    with pytest.raises(HeadScoreError, match="does not exist"):
        HeadScores.load(tmp_path / "absent.json")
    with pytest.raises(HeadScoreError, match="cannot be read"):
        HeadScores.load(tmp_path)
    for name, text, message in [
        ("cut.json", '{"0-0": [0.1', "not valid JSON"),
        ("deep.json", "[" * 100_000, "not valid JSON"),
        ("list.json", "[1, 2]", "neither"),
        ("empty.json", "{}", "neither"),
        ("twice.json", '{"0-0": [0.1], "0-0": [0.2]}', "'0-0' occurs twice"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(HeadScoreError, match=message):
            HeadScores.load(tmp_path / name)
    (tmp_path / "binary.json").write_bytes(b"\x80\x81\xff")
    with pytest.raises(HeadScoreError, match="not valid JSON"):
        HeadScores.load(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(4), r"shape \[4\]"),
        (torch.ones(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.ones(0, 4), r"shape \[0, 4\]"),
        ([[1.0, 2.0], [3.0]], "not a rectangular table"),
        ("abc", "not a rectangular table"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity at layer 0, head 1"),
        (torch.tensor([[1.0], [float("inf")]]), "NaN or infinity at layer 1, head 0"),
        (torch.tensor([[1.0, -1e-9]]), "negative at layer 0, head 1"),
        (torch.zeros(2, 2), "all zero"),
    ],
)
def test_bad_tables_are_refused(values: Any, message: str) -> None:
    with pytest.raises(HeadScoreError, match=message):
        HeadScores(values)


@pytest.mark.parametrize("rows", [[], [0, 4], [4, 4], [5, 4], [True, 4], [4.0, 5]])
def test_curves_are_over_ascending_numbers_of_rows(rows: list) -> None:
    table = torch.ones(2, 4)
    assert Curves([1, 4], table, torch.ones(2, 4, 2)).rows == [1, 4]
    with pytest.raises(HeadScoreError, match="not ascending whole numbers"):
        Curves(rows, table, torch.ones(2, 4, len(rows)))


def test_curves_are_of_the_heads_of_their_scores() -> None:
    curves = Curves([1, 4], torch.ones(2, 4), torch.ones(2, 4, 2))
    assert HeadScores(torch.ones(2, 4), curves=curves).curves is curves
    with pytest.raises(HeadScoreError, match="curves are of"):
        HeadScores(torch.ones(2, 8), curves=curves)
    for sensitivities, distortions in ((torch.ones(2, 4), torch.ones(2, 4, 3)), (torch.ones(8), torch.ones(8, 2))):
        with pytest.raises(HeadScoreError, match="do not fit|must be"):
            Curves([1, 4], sensitivities, distortions)


def test_values_are_a_copy() -> None:
    given = torch.ones(2, 2, dtype=torch.float64)
    scores = HeadScores(given)
    given[0, 0] = -5
    assert scores.values[0, 0] == 1


def test_kv_heads_get_the_sum_of_their_group() -> None:
    scores = HeadScores([[1, 2, 3, 4, 5, 6]])
    assert scores.to_kv_heads(6).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert scores.to_kv_heads(3).tolist() == [[3, 7, 11]]
    assert scores.to_kv_heads(1).tolist() == [[21]]
    with pytest.raises(HeadScoreError, match="num_kv_heads=4"):
        scores.to_kv_heads(4)


def test_sums_are_in_float64_whatever_the_table_was() -> None:
    # 1 + 1/256 is lost when bf16 values are added in bf16.
    table = torch.tensor([[1.0, 1 / 256, 1 / 256, 1 / 256]], dtype=torch.bfloat16)
    assert HeadScores(table).to_kv_heads(1).item() == 1 + 3 / 256
    assert HeadScores(table).normalised().sum().item() == pytest.approx(1.0, abs=1e-15)
    huge = HeadScores(torch.full((2, 2), 1e308, dtype=torch.float64))
    assert huge.normalised().tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_shares_of_the_mass() -> None:
    scores = HeadScores([[50, 30, 10, 10, 0], [0, 0, 0, 0, 0]])
    assert scores.top_share(0.1) == pytest.approx(0.5)
    assert scores.top_share(0.29) == pytest.approx(0.8)
    assert (scores.top_share(0.0), scores.top_share(1.0)) == (0.0, pytest.approx(1.0))
    assert [scores.num_heads_holding(share) for share in (0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    assert scores.held_by_top().tolist() == pytest.approx([0, 0.5, 0.8, 0.9, 1, 1, 1, 1, 1, 1, 1])


def test_shares_of_heads_are_rounded_down() -> None:
    assert [heads_of_share(share, 32) for share in (0, 0.03, 0.05, 0.1, 0.5, 1)] == [0, 0, 1, 3, 16, 32]
    assert [heads_of_share(percent / 100, 100) for percent in range(101)] == list(range(101))
    with pytest.raises(ConfigError, match="1.5"):
        heads_of_share(1.5, 8)


def test_resolving_checks_the_models_shape(tmp_path: Path) -> None:
    scores = HeadScores(torch.ones(2, 4))
    scores.save(tmp_path / "scores.json")
    for source in (scores, tmp_path / "scores.json", str(tmp_path / "scores.json")):
        config = CompressionConfig("sparsemm", 64, source)
        assert Plan(config, 2, 4, 4).head_scores.values.tolist() == scores.values.tolist()
        for shape in [(4, 2), (2, 8), (3, 4)]:
            with pytest.raises(HeadScoreError, match=f"the model has {shape[0]} x {shape[1]}"):
                Plan(config, *shape, shape[1])
    assert Plan(CompressionConfig("snapkv", 64, scores), 7, 7, 7).head_scores is None


def test_random_scores_are_one_seeded_draw_per_model() -> None:
    first = Plan(CompressionConfig("random", 64, seed=1), 4, 8, 8).head_scores.values
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(first, Plan(CompressionConfig("random", 128, seed=1), 4, 8, 8).head_scores.values)
    assert not torch.equal(first, Plan(CompressionConfig("random", 64, seed=2), 4, 8, 8).head_scores.values)
    assert first.unique().numel() == 32  # no layer repeats another
    before = torch.random.get_rng_state()
    Plan(CompressionConfig("random", 64), 4, 8, 8)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif("SPARSEMM_RELEASE_SCORES" not in os.environ, reason="SPARSEMM_RELEASE_SCORES names no file")
def test_the_published_vicuna_scores() -> None:
    """The release's LLaVA-NeXT-Vicuna-7B file, which users fetch themselves."""
    scores = HeadScores.load(os.environ["SPARSEMM_RELEASE_SCORES"])
    scores.check_shape(32, 32)
    assert scores.top_share(0.05) == pytest.approx(0.554, abs=5e-4)
    assert scores.top_share(0.10) == pytest.approx(0.772, abs=5e-4)
    assert [scores.num_heads_holding(share) for share in (0.5, 0.8, 0.9)] == [43, 113, 169]

    def budgets(budget: int, rounding: str) -> torch.Tensor:
        config = CompressionConfig("sparsemm", budget, scores, rounding=rounding)
        return head_budgets(config, num_layers=32, num_query_heads=32, num_kv_heads=32, prompt_length=2880)

    lost = [1 - budgets(budget, "paper").sum().item() / (budget * 1024) for budget in (256, 512, 1024, 2048)]
    assert [round(100 * share) for share in lost] == [3, 20, 41, 59]
    exact = budgets(1024, "exact")
    assert exact.sum() == 1024 * 1024 and exact.min() == 131 and (exact == 2880).sum() == 224

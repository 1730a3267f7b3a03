"""Settings: defaults, every refusal with its message, and the form that results are stored with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import METHODS

SCORES = HeadScores(torch.rand(2, 4, generator=torch.Generator().manual_seed(0)), model="toy")


def test_defaults_are_the_documented_ones() -> None:
    config = CompressionConfig(method="snapkv", budget=256)
    assert dataclasses.asdict(config) == {
        "method": "snapkv",
        "budget": 256,
        "head_scores": None,
        "window_size": 32,
        "kernel_size": 5,
        "ratio": 0.1,
        "rounding": "exact",
        "adakv_floor": 0.2,
        "pyramid_beta": 20,
        "mask_ratio": 0.1,
        "mask_mode": "zero_query",
        "seed": 0,
        "compress_turns": "first",
    }


def test_is_immutable() -> None:
    config = CompressionConfig(method="snapkv", budget=256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1


ALL_METHODS = (
    "adakv, expected_attention, fullkv, head_kv, keydiff, knorm, mask, mask_random, mixkv, pyramidkv, random, "
    "rate_distortion, rate_distortion_mixkv, snapkv, sparsemm, streaming_llm, vl_cache"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "snapkvv"},
            "'snapkvv' is unknown.*" + ALL_METHODS,
        ),
        ({"method": "SnapKV"}, "'SnapKV' is unknown"),
        ({"method": None}, "None is unknown"),
        ({"budget": None}, "needs a budget"),
        ({"budget": 31}, "budget=31 is smaller than window_size=32"),
        ({"budget": 0}, "budget=0 is too small"),
        ({"budget": -64}, "budget=-64 is too small"),
        ({"budget": 64.5}, "budget=64.5 is not an integer"),
        ({"budget": "64"}, "budget='64' is not an integer"),
        ({"budget": True}, "budget=True is not an integer"),
        ({"window_size": 0}, "window_size=0 is too small"),
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"kernel_size": 0}, "kernel_size=0 is too small"),
        ({"ratio": -0.1}, "ratio=-0.1 is out of range"),
        ({"ratio": 1.01}, "ratio=1.01 is out of range"),
        ({"ratio": float("nan")}, "ratio=nan is out of range"),
        ({"ratio": "0.1"}, "ratio='0.1' is not a number"),
        ({"ratio": True}, "ratio=True is not a number"),
        ({"adakv_floor": 2}, "adakv_floor=2 is out of range"),
        ({"pyramid_beta": 0}, "pyramid_beta=0 is too small"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 is out of range"),
        ({"rounding": "floor"}, "rounding='floor' is unknown; use one of exact, paper"),
        ({"mask_mode": "drop"}, "mask_mode='drop' is unknown; use one of zero_query, zero_output"),
        ({"compress_turns": "all"}, "compress_turns='all' is unknown; use one of first, every"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"head_scores": [[1.0]]}, "head_scores is a list"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**{"method": "snapkv", "budget": 64, **settings})


@pytest.mark.parametrize("method", ["sparsemm", "mask", "mask_random"])
def test_methods_that_follow_visual_heads_need_scores(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method='{method}' needs head_scores"):
        CompressionConfig(method=method, budget=64)
    assert CompressionConfig(method=method, budget=64, head_scores=SCORES).head_scores is SCORES


@pytest.mark.parametrize("method", ["fullkv", "mask", "mask_random"])
def test_methods_that_keep_every_row_need_no_budget(method: str) -> None:
    assert CompressionConfig(method=method, head_scores=SCORES).budget is None
    # A table over budgets may hand them one below the window: it is not used.
    assert CompressionConfig(method=method, budget=8, head_scores=SCORES).budget == 8


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fullkv", "mask", "mask_random"}))
def test_methods_that_drop_rows_need_a_budget_that_holds_the_window(method: str) -> None:
    with pytest.raises(ConfigError, match="needs a budget"):
        CompressionConfig(method=method, head_scores=SCORES)
    with pytest.raises(ConfigError, match="raise the budget"):
        CompressionConfig(method=method, budget=8, head_scores=SCORES)
    assert CompressionConfig(method=method, budget=32, head_scores=SCORES, ratio=0).budget == 32


def test_numbers_of_other_kinds_become_plain_ones() -> None:
    config = CompressionConfig(method="snapkv", budget=np.int64(64), ratio=1, adakv_floor=np.float32(0.25))
    assert type(config.budget) is int and config.ratio == 1.0 and type(config.adakv_floor) is float


def test_to_dict_is_json_and_says_which_scores() -> None:
    stored = json.loads(json.dumps(CompressionConfig("sparsemm", 64, Path("scores") / "model.json").to_dict()))
    assert stored["head_scores"] == str(Path("scores") / "model.json")
    assert (stored["method"], stored["budget"], stored["rounding"]) == ("sparsemm", 64, "exact")
    described = json.loads(json.dumps(CompressionConfig("sparsemm", 64, SCORES).to_dict()))["head_scores"]
    assert described["shape"] == [2, 4] and described["provenance"] == {"model": "toy"}
    other = CompressionConfig("sparsemm", 64, HeadScores(SCORES.values + 1)).to_dict()["head_scores"]
    assert other["sha256"] != described["sha256"]


def test_replacing_a_field_validates_again() -> None:
    config = CompressionConfig(method="snapkv", budget=256)
    assert dataclasses.replace(config, budget=64).budget == 64
    with pytest.raises(ConfigError):
        dataclasses.replace(config, budget=8)

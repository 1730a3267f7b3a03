"""What the program takes where no option says it."""

from __future__ import annotations

import pytest

from sparsemm.cli.common import LARGE, SMALL, WIDE, checkout, defaults_of
from sparsemm.cli.options import Model, Reading, Settings


@pytest.mark.parametrize(
    ("model", "defaults"),
    [
        ("llava-hf/llava-v1.6-vicuna-7b-hf", LARGE),
        ("somewhere/qwen3-vl-wide", LARGE),
        ("qwen2-vl", SMALL),
        (str(checkout() / "assets" / "miniatures" / "llava-vicuna"), SMALL),
        ("qwen3-vl-wide", WIDE),
    ],
)
def test_defaults_follow_the_model(model, defaults):
    assert defaults_of(model) == defaults
    assert Settings().fields(model)["window_size"] == defaults.window_size
    pages = Reading(documents=8, tasks="read").pages(Model(model))
    assert {page.image.size for page in pages} == {(defaults.page_size,) * 2}
    assert [page.num_words for page in pages[:4]] == list(defaults.num_words)


def test_options_win_over_defaults():
    pages = Reading(documents=2, tasks="read", num_words="3", page_size=128).pages(Model("qwen3-vl-wide"))
    assert {(page.image.size, page.num_words) for page in pages} == {((128, 128), 3)}
    assert Settings(window_size=7).fields("qwen3-vl-wide")["window_size"] == 7

"""An untrained miniature on disk, and the program run in this process."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from toy_models import TINY_MINIATURE

from sparsemm.cli import main
from sparsemm.experiments.session import heldout_pages
from sparsemm.head_scores import Curves, HeadScores
from sparsemm.miniatures.architectures import build_model, build_processor


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cli")
    build_model("qwen2-vl", dims=TINY_MINIATURE).save_pretrained(folder / "toy")
    build_processor("qwen2-vl", TINY_MINIATURE).save_pretrained(folder / "toy")
    HeadScores(torch.arange(1.0, 9.0).view(2, 4), model="toy").save(folder / "toy.json")
    curves = Curves([4, 8, 300], torch.ones(2, 4), torch.tensor([1.0, 0.3, 0.0]).expand(2, 4, 3).clone())
    HeadScores(torch.arange(1.0, 9.0).view(2, 4), curves=curves, model="toy").save(folder / "calibration.json")
    heldout_pages(1, tasks=("read",))[0].image.save(folder / "page.png")
    return {
        "model": folder / "toy", "scores": folder / "toy.json", "image": folder / "page.png",
        "calibration": folder / "calibration.json",
    }  # fmt: skip


@dataclasses.dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def commands_are_put_together_once() -> Iterator[None]:
    """Typer makes them anew for every run, which takes longer than most runs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsemm", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as ending:
            status = ending.code or 0
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call

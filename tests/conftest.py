"""Settings of the whole test suite."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU and the compiled CUDA kernels (`make gpu-check` runs these)")


@pytest.fixture(autouse=True)
def timings_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are not measured again because this machine is busy; tests of that set the limit themselves."""
    monkeypatch.setattr("sparsemm.runs.spread.NOISY", float("inf"))


@pytest.fixture(autouse=True)
def log_level_ends_with_its_test() -> Iterator[None]:
    """The command line sets the level of the package's log, for the whole process."""
    logger = logging.getLogger("sparsemm")
    level = logger.level
    yield
    logger.setLevel(level)

"""Settings of the whole test suite."""

from __future__ import annotations


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU and the compiled CUDA kernels (`make gpu-check` runs these)")

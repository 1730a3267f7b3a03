"""What the package is measured against: transformers as users run it, kvpress, and copying the cache at every token."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparsemm.cache import SparseCache, SparseLayer
from sparsemm.cache.chunk import Chunk
from sparsemm.decoding import DecodeLoop
from sparsemm.errors import ConfigError
from sparsemm.plan import Plan


class CopyingLayer(SparseLayer):
    """The original release's way to append: new buffers with one more slot a list, and every cached row copied."""

    def _append(self, key: Tensor, value: Tensor, chunk: Chunk) -> None:
        self._spread(chunk.columns)
        super()._append(key, value, chunk)

    def append_rotated(self, *states: Tensor, **how: Any) -> Tensor:
        self._spread(1)
        return super().append_rotated(*states, **how)

    def grow(self, rows: int) -> None:
        """Every append makes its own room."""


class CopyingLoop(DecodeLoop):
    """Decodes with `CopyingLayer`s. Buffers move at every token, so there is no graph to replay."""

    def make_cache(self, given: Any, plan: Plan) -> SparseCache:
        cache = super().make_cache(given, plan.with_reserve(1))
        cache.layers = [CopyingLayer(cache.plan, layer_idx, cache.record) for layer_idx in range(plan.num_layers)]
        return cache


def kvpress_is_installed() -> bool:
    return importlib.util.find_spec("kvpress") is not None


@contextmanager
def kvpress_snapkv(model: nn.Module, budget: int, window_size: int, prompt_tokens: int) -> Iterator[None]:
    """kvpress' SnapKV at the same number of rows. Raises `ConfigError` where kvpress is not installed."""
    if not kvpress_is_installed():
        raise ConfigError("kvpress is not installed; `pip install kvpress`, or leave it out of the methods")
    from kvpress import SnapKVPress

    press = SnapKVPress(compression_ratio=max(0.0, 1 - budget / prompt_tokens), window_size=window_size)
    with press(model):
        yield

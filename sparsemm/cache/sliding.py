"""The cache of a layer with a sliding window: transformers' own, from which the last columns can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from sparsemm.cache.chunk import Columns
from sparsemm.cache.stats import CacheRecord
from sparsemm.errors import CacheError

SPARE = 8
"""Columns kept behind a full window: so many can be taken back."""


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of the last columns, padding included, `[batch, num_kv_heads, columns, head_dim]`."""

    is_croppable = False  # only the last columns of a full window can be taken back

    def __init__(self, sliding_window: int, layer_idx: int, record: CacheRecord) -> None:
        super().__init__(sliding_window)
        self.layer_idx, self.record = layer_idx, record
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self._before: tuple[Tensor, Tensor, int] | None = None  # a long chunk, which `restore` may take back
        self._note_bytes()

    @property
    def seen(self) -> int:
        """Columns fed, padding included."""
        return self.cumulative_length

    @property
    def removable(self) -> int:
        """Columns that `crop` can take back."""
        stored = self.keys.shape[-2] if self.is_initialized else 0
        return stored if stored == self.seen else stored - (self.sliding_window - 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that the new columns may attend to, as transformers' own layer returns them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        self._before = (self.keys, self.values, self.seen) if new > SPARE else None
        kept, visible = self.sliding_window - 1 + SPARE, self.sliding_window - 1 + new
        self.keys, self.values = (states.detach()[:, :, -kept:] for states in (keys, values))
        if keys.shape[-2] - kept > SPARE:  # a view would hold the whole prompt
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.cumulative_length += new
        self._note_bytes()
        return keys[:, :, -visible:], values[:, :, -visible:]

    def settle(self) -> None:
        """The last forward ran to its end."""
        self._before = None

    def restore(self, columns: Columns, fed: Columns) -> None:
        """Take back what was fed behind `columns`. Raises `CacheError` where the window has moved on too far."""
        surplus = self.seen - columns.count
        if self._before is not None and self._before[2] == columns.count:
            self.keys, self.values, self.cumulative_length = self._before
        elif surplus > self.removable:
            raise CacheError(f"a sliding window of {self.sliding_window} tokens has moved on by {surplus} columns")
        elif surplus > 0:
            self.keys, self.values = self.keys[:, :, :-surplus], self.values[:, :, :-surplus]
            self.cumulative_length = columns.count
        self._before = None
        self._note_bytes()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._note_bytes()

    def memory_bytes(self) -> int:
        """Bytes of the buffers."""
        held = (self.keys, self.values) if self.is_initialized else ()
        return sum(states.untyped_storage().nbytes() for states in held)

    def _note_bytes(self) -> None:
        self.record.sliding_bytes[self.layer_idx] = self.memory_bytes()

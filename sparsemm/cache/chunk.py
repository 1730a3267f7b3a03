"""The columns of one forward: which are tokens, which padding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm.cache.selection import take_columns


@dataclass(frozen=True)
class Chunk:
    """The columns that one forward feeds, the same for every layer.

    Attributes:
        mask: bool `[batch, columns]`, True = a token, or None when every column is one.
        lengths: Valid columns of each batch row, on the host; None for a single decoded column, where only the device
            need know.
        order: int64 `[batch, columns]` that brings valid columns to the right end, or None when they are there.
        num_later: int32 `[batch, columns]`, valid columns behind each one; None where column order already says it.
        counted: Whether layers account for the columns as they come. False in decode steps that may be replayed from a
            CUDA graph, where no Python runs: `SparseCache.count_steps` accounts for them afterwards.
    """

    batch: int
    columns: int
    mask: Tensor | None
    lengths: list[int] | None
    order: Tensor | None
    num_later: Tensor | None
    counted: bool = True

    @classmethod
    def of_step(cls, batch: int, *, counted: bool = False) -> Chunk:
        """One decoded token of every sequence."""
        return cls(batch, 1, None, [1] * batch, None, None, counted)

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, columns: int, *, needs_lengths: bool) -> Chunk:
        if mask is not None and (needs_lengths or mask.device.type == "cpu") and bool(mask.all()):
            mask = None
        if mask is None:
            return cls(batch, columns, None, [columns] * batch, None, None)
        if not needs_lengths:  # a decoded column: nothing is behind it
            return cls(batch, columns, mask, None, None, None)
        num_later = (mask.flip(1).cumsum(1).flip(1) - mask.long()).int()
        left_padded = bool((mask[:, 1:] >= mask[:, :-1]).all())
        order = None if left_padded else mask.int().argsort(dim=1, stable=True)
        return cls(batch, columns, mask, mask.sum(1).tolist(), order, num_later)

    def to(self, device: torch.device) -> Chunk:
        """The same chunk for a layer on `device`."""
        if self.mask is None or self.mask.device == device:
            return self
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name in ("mask", "order", "num_later")
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    def right_aligned(self, states: Tensor) -> Tensor:
        """`states` `[batch, heads, columns, head_dim]` with the valid columns at the right end, in order."""
        return states if self.order is None else take_columns(states, self.order)

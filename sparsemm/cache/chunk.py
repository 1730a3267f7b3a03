"""The columns that a cache is fed: which are tokens, which padding; those of one forward, and all so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm.cache.selection import take_columns
from sparsemm.errors import CacheError


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
        prompt_lengths: Valid tokens seen with this chunk, for each batch row that it compresses; None for a row that
            keeps all it has. None altogether: nothing is compressed.
        image: bool `[batch, columns]`, which of them show an image, where the method asks.
        ahead: cos and sin of the positions to come, averaged over them, `[..., batch or 1, 1, size]`, where it asks.
    """

    batch: int
    columns: int
    mask: Tensor | None = None
    lengths: list[int] | None = None
    order: Tensor | None = None
    num_later: Tensor | None = None
    counted: bool = True
    prompt_lengths: list[int | None] | None = None
    image: Tensor | None = None
    ahead: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_step(cls, batch: int, *, counted: bool = False) -> Chunk:
        """One decoded token of every sequence."""
        return cls(batch, 1, lengths=[1] * batch, counted=counted)

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, columns: int, *, needs_lengths: bool) -> Chunk:
        """Columns by their `mask`; without `needs_lengths` nothing of a mask on a GPU is waited for."""
        if mask is not None and (needs_lengths or mask.device.type == "cpu") and bool(mask.all()):
            mask = None
        if mask is None:
            return cls(batch, columns, lengths=[columns] * batch)
        if not needs_lengths:  # a decoded column: nothing is behind it
            return cls(batch, columns, mask)
        num_later = (mask.flip(1).cumsum(1).flip(1) - mask.long()).int()
        left_padded = bool((mask[:, 1:] >= mask[:, :-1]).all())
        order = None if left_padded else mask.int().argsort(dim=1, stable=True)
        return cls(batch, columns, mask, mask.sum(1).tolist(), order, num_later)

    def to(self, device: torch.device) -> Chunk:
        """The same chunk for a layer on `device`."""
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name in ("mask", "order", "num_later", "image")
            if (tensor := getattr(self, name)) is not None and tensor.device != device
        }
        return dataclasses.replace(self, **moved) if moved else self

    def right_aligned(self, states: Tensor | None) -> Tensor | None:
        """`states` `[batch, heads, columns, head_dim]` with the valid columns at the right end, in order."""
        return states if self.order is None or states is None else take_columns(states, self.order)

    @property
    def image_right_aligned(self) -> Tensor | None:
        """`image` with the valid columns at the right end."""
        return self.image if self.order is None or self.image is None else self.image.gather(1, self.order)


@dataclass(frozen=True)
class Columns:
    """All columns that a cache was fed, by forwards that ran to their end.

    Attributes:
        mask: bool `[batch, count]`, True = a token, or None when every column is one.
    """

    batch: int = 0
    count: int = 0
    mask: Tensor | None = None

    def next_chunk(self, attention_mask: Tensor | None, batch: int, columns: int) -> Chunk:
        """So many new columns, as `attention_mask` tells of them: `[batch, count + columns]`, 1 = token, 0 = padding.

        Raises:
            CacheError: The mask has another shape or contradicts the columns fed, or the batch size changed.
        """
        seen = self.count
        if attention_mask is not None:
            found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            if found != (batch, seen + columns):
                raise CacheError(
                    f"attention_mask has shape {found}, expected the 2-D {(batch, seen + columns)}, 1 = token and 0 "
                    f"= padding: {seen} columns are cached and {columns} are new; other masks are not supported"
                )
        if seen and batch != self.batch:
            raise CacheError(f"the cache holds {self.batch} sequences, got a batch of {batch}")
        needs_lengths = seen == 0 or columns > 1
        mask = None if attention_mask is None else attention_mask[:, seen:].bool()
        if mask is not None and seen and (needs_lengths or mask.device.type == "cpu"):
            before = attention_mask[:, :seen].bool()
            if not bool(before.all() if self.mask is None else torch.equal(before, self.mask.to(before.device))):
                raise CacheError(
                    "attention_mask tells the cached columns to be other tokens and padding than they were fed as"
                )
        return Chunk.of(mask, batch, columns, needs_lengths=needs_lengths)

    def followed_by(self, chunk: Chunk, times: int = 1) -> Columns:
        """These, and the chunk's behind them, so many times over."""
        count = self.count + times * chunk.columns
        if self.mask is None and chunk.mask is None:
            return Columns(chunk.batch, count)
        like = chunk.mask if self.mask is None else self.mask
        parts = [
            like.new_ones(chunk.batch, columns) if mask is None else mask.to(like.device)
            for mask, columns in ((self.mask, self.count), (chunk.mask, times * chunk.columns))
        ]
        return Columns(chunk.batch, count, torch.cat(parts, dim=1))

    def first(self, count: int) -> Columns:
        """The first `count` of them."""
        return Columns(self.batch, count, None if self.mask is None else self.mask[:, :count].clone())

    def select(self, indices: Tensor) -> Columns:
        """Those of the batch rows `indices`, int64."""
        mask = None if self.mask is None else self.mask[indices.to(self.mask.device)]
        return Columns(len(indices), self.count, mask)

    def tokens(self, begin: int = 0, end: int | None = None) -> Tensor | int:
        """Tokens of each batch row among the columns begin .. end - 1: int32 `[batch]`, or one number for all rows."""
        end = self.count if end is None else end
        return end - begin if self.mask is None else self.mask[:, begin:end].sum(1, dtype=torch.int32)

    def rope_deltas(self, position_ids: Tensor) -> Tensor:
        """How far the next token's M-RoPE position is from the number of tokens: int64 `[batch, 1]`.

        `position_ids` of the columns fed last, `[batch or 1, columns]`, or `[3 or 4, batch, columns]` where a fourth,
        first axis counts text tokens.
        """
        highest = position_ids[-3:].amax((0, 2)) if position_ids.dim() == 3 else position_ids.amax(1)
        tokens = self.tokens()
        tokens = tokens if isinstance(tokens, int) else tokens.to(highest.device)
        return (highest + 1 - tokens).expand(self.batch)[:, None].clone()

    def lengths(self) -> list[int]:
        """Tokens of each batch row, on the host."""
        tokens = self.tokens()
        return [tokens] * self.batch if isinstance(tokens, int) else tokens.tolist()

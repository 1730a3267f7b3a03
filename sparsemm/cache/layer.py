"""What the attention forward asks of one layer's rows: store a prompt, attend to what is kept, drop what is not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import LongTensor, Tensor

from sparsemm.cache.chunk import Chunk, Columns
from sparsemm.cache.rows import RowLists
from sparsemm.cache.selection import KeptRows, choose_rows, is_covered, keep_best, score_layer
from sparsemm.errors import CacheError
from sparsemm.methods import PromptStates
from sparsemm.ops.backends import DecodeBackend, VarlenDecode, operators, overload, resolve_backend
from sparsemm.ops.chunk import MAX_DECODE_QUERIES, causal_attention, merge_attention


@functools.cache  # resolved, and said in the log, once
def _backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> DecodeBackend:
    return resolve_backend(name, device, dtype, head_dim)


@functools.cache
def _varlen_decode(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenDecode:
    backend = _backend(name, device, dtype, head_dim)
    # The operator itself, where it is what the backend calls; and where twins serve it, which traces and exports know
    # by name.
    own = backend.name in ("cuda", "cpu") or (name, backend.name) == ("auto", "reference")
    return overload(operators(device, dtype, head_dim).varlen_decode) if own else backend.varlen_decode


@functools.cache
def _rope_append(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor]:
    return overload(operators(device, dtype, head_dim).rope_append)


class SparseLayer(RowLists):
    """Row lists that a prompt fills with what the method keeps of it, and that later tokens attend to."""

    def reset(self) -> None:
        super().reset()
        self.waiting: tuple[Tensor, Tensor] | None = None  # what `score_layer` found, until the last layer has run

    def restore(self, columns: Columns, fed: Columns) -> None:
        """As `RowLists.restore`; what waited to be chosen among is forgotten."""
        self.waiting = None
        super().restore(columns, fed)

    def store_prompt(
        self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float, **rotation: Tensor
    ) -> None:
        """Keep the chosen rows of the first chunk; all of them where they are chosen by `choose_waiting`.

        query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]`, after RoPE; `scale` is the factor of the attention
        logits, `rotation` as `PromptStates` has it.
        """
        chunk = chunk.to(key.device)
        key, value = (chunk.right_aligned(states.detach()) for states in (key, value))
        starts = (chunk.columns - torch.tensor(chunk.lengths, dtype=torch.int32))[:, None]
        starts = starts.expand(-1, self.plan.own_kv_heads)
        states = PromptStates(key=key, value=value, starts=starts, **self._fed(query.detach(), chunk, scale, rotation))
        if self.plan.decides_last(chunk.prompt_lengths):
            self.waiting = score_layer(self.plan, states)
            rows = keep_best(key, starts, self.plan.config.window_size, [None] * chunk.batch)
        else:
            rows = choose_rows(self.plan, self.layer_idx, states, chunk.prompt_lengths)
        self._fill(key, value, rows, chunk.columns, frozen=0 if self._keeps_all(rows, chunk) else chunk.columns)

    def _keeps_all(self, rows: KeptRows, chunk: Chunk) -> bool:
        """Whether the first chunk lost no row, in any process: what can be taken back later is the same in all."""
        if self.plan.parallel.divided and self.plan.method.compresses:
            return all(is_covered(self.plan.config, length) for length in chunk.prompt_lengths)
        return rows.total == sum(chunk.lengths) * self.plan.own_kv_heads

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float, **rotation: Tensor
    ) -> Tensor:
        """Append the chunk and attend to everything kept: arguments as above for n columns; `[B, Hq, n, D]`."""
        chunk = chunk.to(key.device)
        query, key, value = query.detach(), key.detach(), value.detach()
        if chunk.columns <= MAX_DECODE_QUERIES:
            self._append(key, value, chunk)
            out, _ = self.decode(query, scale, chunk.num_later)
        else:
            none_later = torch.zeros(chunk.batch, chunk.columns, dtype=torch.int32, device=query.device)
            kept = self.decode(query, scale, none_later)
            out = merge_attention(kept, causal_attention(query, key, value, scale, chunk.mask))
            self._append(key, value, chunk)
        if chunk.prompt_lengths is not None:
            self._compress_again(chunk, self._fed(query, chunk, scale, rotation))
        return out

    def choose_waiting(self, chunk: Chunk, budgets: list[LongTensor | None]) -> None:
        """Drop rows by what the layer's scorer found, now that the last layer has run.

        budgets: int64 `[num_kv_heads]` of each sequence, window included; None for one that keeps all rows.
        """
        (scores, _), self.waiting = self.waiting, None
        key, value, starts = self._held(chunk.batch)
        window = self.plan.config.window_size
        # Columns that were padding in every sequence hold no rows.
        rows = keep_best(key, starts, window, budgets, lambda _: scores[..., -max(1, key.shape[2] - window) :])
        self._keep(key, value, starts, rows, chunk)

    def append_rotated(self, *states: Tensor, rotation: tuple[Any, ...], chunk: Chunk | None = None) -> Tensor:
        """Append one token of every sequence that is not rotated yet; its query `[B, Hq, 1, D]`, rotated.

        Args:
            states: Query `[B, Hq, 1, D]`, key and value `[B, Hkv, 1, D]`, cos and sin `[B or 1, 1, dimensions]`.
            rotation: The last arguments of `rope_append`, from the weights of its norms on.
            chunk: The token's column; None in steps that are counted afterwards.
        """
        query = states[0]
        counted, mask = (False, None) if chunk is None else (chunk.counted, chunk.to(query.device).mask)
        if counted and self.room < 1:
            self.grow(1)
        rope_append = _rope_append(query.device, query.dtype, query.shape[-1])
        buffers = self.offsets, self.lens, self.key_buffer, self.value_buffer, self.overflow
        query = rope_append(*states, *buffers, mask, *rotation)
        self.seen += counted
        return query

    def decode(self, query: Tensor, scale: float, num_later: Tensor | None) -> tuple[Tensor, Tensor]:
        """`varlen_decode` of the queries `[B, Hq, n, D]` over all rows."""
        decode = _varlen_decode(self.plan.decode_backend, query.device, query.dtype, query.shape[-1])
        return decode(query, self.key_buffer, self.value_buffer, self.offsets, self.lens, scale, num_later)

    def top_columns(self, query: Tensor) -> LongTensor:
        """The token (0 = first valid one) with the largest attention weight of each query head.

        query `[B, Hq, n, D]`: of the last n tokens stored, of which each attends to itself and those before it. Batched
        over heads, nothing is read back. int64 `[B, Hq, n]`. Raises `CacheError` for a cache that drops rows.
        """
        if self.plan.method.compresses:
            raise CacheError("rows of a compressed cache are not columns; look at attention with method='fullkv'")
        batch, num_query_heads, columns, head_dim = query.shape
        num_kv_heads = self.plan.own_kv_heads
        row = torch.arange(self.seen, device=query.device)
        slots = (self.offsets[:-1, None] + row).clamp(max=self.key_buffer.shape[0] - 1)
        key = self.key_buffer[slots].view(batch, num_kv_heads, 1, self.seen, head_dim)
        grouped = query.view(batch, num_kv_heads, -1, columns, head_dim)
        logits = grouped.float() @ key.float().transpose(-1, -2)
        later = torch.arange(columns - 1, -1, -1, device=query.device)  # tokens stored after each of them
        seen = row < self.lens.view(batch, num_kv_heads, 1, 1, 1) - later[:, None]
        return logits.masked_fill(~seen, float("-inf")).argmax(-1).view(batch, num_query_heads, columns)

    def _compress_again(self, chunk: Chunk, fed: dict[str, Any]) -> None:
        """Kept rows and the new chunk compete, ranked by the chunk's last queries (`compress_turns="every"`)."""
        key, value, starts = self._held(chunk.batch)
        states = PromptStates(key=key, value=value, starts=starts, **fed)
        if self.plan.decides_last(chunk.prompt_lengths):
            self.waiting = score_layer(self.plan, states)
        else:
            rows = choose_rows(self.plan, self.layer_idx, states, chunk.prompt_lengths)
            self._keep(key, value, starts, rows, chunk)

    def _fed(self, query: Tensor, chunk: Chunk, scale: float, rotation: dict[str, Tensor]) -> dict[str, Any]:
        """What `PromptStates` says of the columns fed."""
        return {
            "query": chunk.right_aligned(query),
            "num_queries": torch.tensor(chunk.lengths, dtype=torch.int32),
            "window_size": self.plan.config.window_size,
            "scaling": scale,
            "image": chunk.image_right_aligned,
            "unrotated": chunk.right_aligned(rotation.get("unrotated")),
            "ahead": rotation.get("ahead"),
        }

    def _keep(self, key: Tensor, value: Tensor, starts: Tensor, rows: KeptRows, chunk: Chunk) -> None:
        """Drop what is not among `rows` of what `_held` gave."""
        # What a batch row gained without being chosen among is no part of its prompt.
        again = torch.tensor([length is not None for length in chunk.prompt_lengths], device=key.device)
        prompt_rows = torch.where(self._per_list(again), rows.kept.reshape(-1), self.prompt_rows)
        if rows.total < starts.numel() * key.shape[2] - int(starts.sum()):  # else the rows stay where they are
            self._fill(key, value, rows, self.seen, frozen=self.seen)
        elif self.plan.parallel.divided:  # heads of other processes may have lost rows
            self.frozen = self.seen
        self.prompt_rows = prompt_rows

"""The evicting cache as transformers sees it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache

from sparsemm.cache.chunk import Chunk, Columns
from sparsemm.cache.layer import SparseLayer
from sparsemm.cache.sliding import SlidingLayer
from sparsemm.cache.stats import CacheRecord
from sparsemm.errors import CacheError
from sparsemm.plan import Plan

logger = logging.getLogger(__name__)


class SparseCache(Cache):
    """A transformers cache whose kv heads hold different numbers of rows.

    Made by the patched model when a generation starts; returned as `past_key_values`. `copy.deepcopy` gives an
    independent cache, so a compressed prompt can be continued several times.

    A forward is all or nothing: `begin_chunk`, the layers, then `end_chunk`, or `roll_back` after an exception. What
    cannot be rolled back leaves the cache broken: every later use but `reset` raises `CacheError`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.record = CacheRecord(plan)
        rows = itertools.count()
        super().__init__(
            layers=[
                SparseLayer(plan, next(rows), self.record) if window is None else SlidingLayer(window, idx, self.record)
                for idx, window in enumerate(plan.sliding_windows or (None,) * plan.num_layers)
            ]
        )
        self._forget()

    def _forget(self) -> None:
        self.chunk: Chunk | None = None  # of the forward or the steps under way
        self._begun = 0  # columns fed when the steps under way began
        self._broken: str | None = None
        self.record.columns, self.record.rope_deltas = Columns(), None

    @property
    def ragged(self) -> list[SparseLayer]:
        """The layers of the plan, which all others but those with a sliding window are."""
        return [layer for layer in self.layers if not layer.is_sliding]

    @property
    def columns(self) -> Columns:
        """The columns fed by whole forwards."""
        return self.record.columns

    @property
    def rope_deltas(self) -> Tensor | None:
        """M-RoPE offset of generated tokens, int64 `[batch, 1]`, where the model has one."""
        return self.record.rope_deltas

    def memory_bytes(self) -> int:
        """Bytes held: rows, slack, masks, index tensors and sliding windows."""
        return self.record.memory_bytes() + sum(self.record.sliding_bytes.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self._refuse_if_broken()
        return self.layers[layer_idx].seen

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first prompt."""
        return self.columns.batch if self.columns.count else -1

    def mask_of_next(self, columns: int) -> Tensor | None:
        """The `attention_mask` of so many more tokens where padding is cached beside sliding windows; else None."""
        if not self.plan.sliding_windows or self.columns.mask is None:
            return None
        return self.columns.followed_by(Chunk(self.columns.batch, columns)).mask.long()

    # -- whole forwards ---------------------------------------------------------------------------------------------

    def begin_chunk(
        self,
        attention_mask: Tensor | None,
        batch: int,
        columns: int,
        *,
        image: Tensor | None = None,
        ahead: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Announce the columns of the coming forward, which `end_chunk` or `roll_back` must end.

        Args:
            attention_mask: `[batch, seen + columns]`, 1 = token, 0 = padding; None when every new column is a token.
            image, ahead: What the method asks for (`Method.sees`), as `Chunk` has it.

        Raises:
            CacheError: The mask has another shape or contradicts the columns cached, the batch size changed, or the
                cache is broken.
        """
        self._check()
        fed = self.columns
        chunk = fed.next_chunk(attention_mask, batch, columns)
        if fed.count == 0:
            chunk = dataclasses.replace(chunk, prompt_lengths=chunk.lengths)
        elif columns > 1 and self.plan.config.compress_turns == "every" and self.plan.method.compresses:
            # A row with fewer than two new tokens reads as it would alone, where one token is a decode step.
            compressed = [new > 1 for new in chunk.lengths]
            if any(compressed):
                lengths = fed.followed_by(chunk).lengths()
                lengths = [length if again else None for length, again in zip(lengths, compressed, strict=True)]
                chunk = dataclasses.replace(chunk, prompt_lengths=lengths)
        self.chunk = dataclasses.replace(chunk, image=image, ahead=ahead)

    def end_chunk(self, mrope_positions: Tensor | None = None) -> None:
        """Account for the forward that `begin_chunk` announced, which has run through all layers; choose the rows where
        budgets depend on all of them.

        `mrope_positions`: The `position_ids` of its columns, `[batch or 1, columns]` or `[3 or 4, batch, columns]`,
        where the model offsets the positions of later tokens.
        """
        record, chunk = self.record, self.chunk
        columns = self.columns.followed_by(chunk)
        if self.columns.count == 0 or chunk.columns > 1:
            record.rope_deltas = None if mrope_positions is None else columns.rope_deltas(mrope_positions)
        if chunk.prompt_lengths is not None and self.plan.decides_last(chunk.prompt_lengths):
            # The rule looks at all heads of all layers, whichever process has them.
            heads = [self.plan.parallel.gather(layer.waiting[1], dim=1).double().cpu() for layer in self.ragged]
            budgets = [
                self.plan.prompt_budgets(length, said)
                for length, said in zip(chunk.prompt_lengths, torch.stack(heads, dim=1), strict=True)
            ]
            own = self.plan.parallel.own(self.plan.num_kv_heads)
            for layer in self.ragged:
                layer.choose_waiting(chunk, [None if rows is None else rows[layer.layer_idx, own] for rows in budgets])
        if chunk.prompt_lengths is not None:
            before = record.prompt_tokens if self.columns.count else chunk.lengths
            record.prompt_tokens = [
                old if new is None else new for new, old in zip(chunk.prompt_lengths, before, strict=True)
            ]
            record.kept = [layer.prompt_rows for layer in self.ragged]
        for layer in self.layers:
            if layer.is_sliding:
                layer.settle()
        self.chunk = None
        record.columns = columns

    def roll_back(self) -> None:
        """Undo what a broken-off forward or decode step did to the layers; mark the cache broken if that is impossible.

        Everything goes back to the columns counted by `end_chunk` and `count_steps`. Rows that the forward has chosen
        among (`compress_turns="every"`) or was moving cannot come back.
        """
        if self._broken is not None:
            return
        self._broken = "was left in the middle of a forward by an exception"
        fed = self.columns
        try:
            if fed.count == 0:
                for layer in self.layers:
                    layer.reset()
            elif any(layer.torn or layer.filled > fed.count for layer in self.ragged):
                return
            else:
                for layer in self.layers:
                    layer.restore(fed, fed)
                for layer, rows in zip(self.ragged, self.record.kept, strict=True):
                    layer.prompt_rows = rows
        except Exception as error:  # the first one is what the caller is to see
            logger.warning("the cache could not be rolled back: %s", error)
            return
        self.chunk = self._broken = None

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise CacheError(f"this cache {self._broken}; start a new one, or empty it with reset()")

    def _check(self) -> None:
        """Raise `CacheError` for a broken cache, and one whose layers differ."""
        self._refuse_if_broken()
        seen = [layer.seen for layer in self.layers]
        if any(count != self.columns.count for count in seen):
            raise CacheError(
                f"the layers of this cache hold {seen} columns where {self.columns.count} were fed: a forward did not "
                "run to its end; start a new cache, or empty it with reset()"
            )

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        """Something done to all layers, after which they agree; an exception in between breaks the cache."""
        self._check()
        self._broken = f"was left in the middle of {what} by an exception"
        yield
        self._broken = None

    # -- decode steps without host work -----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that every list of every layer can still take before a buffer has to move."""
        return min(layer.room for layer in self.ragged)

    def begin_steps(self, *, watched: bool = False) -> None:
        """Let the coming forwards each append one token of every sequence and touch nothing but the device.

        Such a forward can be captured in a CUDA graph and replayed. It needs `room`, and `count_steps` once it has run.
        `watched` is for steps that are not captured: the layers' accounts are then right while a step still runs.
        Raises `CacheError` before the first prompt.
        """
        self._check()
        if self.columns.count == 0:
            raise CacheError("decode steps need a prompt in the cache; run the prompt through the model first")
        self._begun = self.columns.count
        self.chunk = Chunk.of_step(self.columns.batch, counted=watched)

    def count_steps(self, steps: int) -> None:
        """Account on the host for the forwards since `begin_steps`, `steps` in all. Saying so again changes nothing."""
        self.record.columns = self.columns.first(self._begun).followed_by(Chunk.of_step(self.columns.batch), steps)
        for layer in self.ragged:
            layer.seen = self.columns.count

    def grow(self, rows: int) -> None:
        """Make room for at least `rows` more tokens. Buffers move: graphs captured before must not be replayed."""
        self._check()
        try:
            for layer in self.ragged:
                layer.grow(rows)
        except BaseException:
            self.roll_back()
            raise

    # -- beams, batches, taking back --------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns: a negative count, or (as transformers < 5.20 calls it) a positive final size.

        Raises:
            CacheError: The columns reach into a compressed prompt, whose dropped rows cannot be brought back, or
                further back than a sliding window does.
        """
        self._check()
        fed = self.columns
        columns = -tokens_to_remove if tokens_to_remove <= 0 else max(0, fed.count - tokens_to_remove)
        if columns == 0 or fed.count == 0:
            return
        removable = min(layer.removable for layer in self.layers)
        if columns > removable:
            raise CacheError(
                f"cannot take back {columns} of {fed.count} cached columns: only the last {removable} were appended "
                "after the prompt was compressed, or are within reach of all sliding windows"
            )
        with self._change("crop"):
            left = fed.first(fed.count - columns)
            for layer in self.layers:
                layer.restore(left, fed)
            for layer in self.ragged:
                layer.prompt_rows = torch.minimum(layer.prompt_rows, layer.lens)
            record, tokens = self.record, left.lengths()
            record.columns, record.kept = left, [layer.prompt_rows for layer in self.ragged]
            record.prompt_tokens = [min(pair) for pair in zip(record.prompt_tokens, tokens, strict=True)]

    def reset(self) -> None:
        """Empty the cache, a broken one too."""
        super().reset()
        self._forget()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (repeats allowed).

        Raises `IndexError` for a row that is not there, `CacheError` where none would be left.
        """
        self._check()
        rows = torch.arange(self.columns.batch)[indices.cpu()]
        if self.columns.count == 0:
            return
        if len(rows) == 0:
            raise CacheError("no sequence would be left in the cache; empty it with reset()")
        with self._change("a selection of batch rows"):
            super().batch_select_indices(rows)
            record = self.record
            record.prompt_tokens = [record.prompt_tokens[row] for row in rows.tolist()]
            record.kept = [layer.prompt_rows for layer in self.ragged]
            record.columns = record.columns.select(rows)
            if record.rope_deltas is not None:
                record.rope_deltas = record.rope_deltas[rows.to(record.rope_deltas.device)]

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Give beam i the rows of beam `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.columns.batch).repeat_interleave(repeats))

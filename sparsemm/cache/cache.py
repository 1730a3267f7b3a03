"""The evicting cache as transformers sees it."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache

from sparsemm.cache.chunk import Chunk
from sparsemm.cache.layer import SparseLayer
from sparsemm.cache.stats import CacheRecord
from sparsemm.errors import CacheError
from sparsemm.plan import Plan


class SparseCache(Cache):
    """A transformers cache whose kv heads hold different numbers of rows.

    Made by the patched model when a generation starts; returned as `past_key_values`. `copy.deepcopy` gives an
    independent cache, so a compressed prompt can be continued several times.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.record = CacheRecord(plan)
        super().__init__(layers=[SparseLayer(plan, layer_idx, self.record) for layer_idx in range(plan.num_layers)])
        self._forget()

    def _forget(self) -> None:
        self.chunk: Chunk | None = None
        self.attention_mask: Tensor | None = None  # of all columns seen, as last handed in; None = all ones
        self.rope_deltas: Tensor | None = None  # Qwen2-VL: M-RoPE offset of generated tokens, [batch, 1]

    def memory_bytes(self) -> int:
        """Bytes held by all layers: rows, slack and index tensors."""
        return sum(layer.memory_bytes() for layer in self.layers)

    def begin_chunk(self, attention_mask: Tensor | None, batch: int, columns: int) -> None:
        """Announce the columns of the coming forward.

        Args:
            attention_mask: `[batch, seen + columns]`, 1 = token, 0 = padding; None when every column is a token.

        Raises:
            CacheError: The mask is not two-dimensional, has another length, or the batch size changed.
        """
        seen = self.get_seq_length()
        if attention_mask is not None:
            found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            if found != (batch, seen + columns):
                raise CacheError(
                    f"attention_mask has shape {found}, expected the 2-D {(batch, seen + columns)}, 1 = token and 0 "
                    f"= padding: {seen} columns are cached and {columns} are new; other masks are not supported"
                )
        if self.chunk is not None and seen and batch != self.batch_size:
            raise CacheError(f"the cache holds {self.batch_size} sequences, got a batch of {batch}")
        first = seen == 0
        mask = None if attention_mask is None else attention_mask[:, seen:].bool()
        self.chunk = Chunk.of(mask, batch, columns, needs_lengths=first or columns > 1)
        self.attention_mask = attention_mask
        if first:
            self.record.prompt_tokens[:] = self.chunk.lengths
            self.record.appended_rows = 0
        elif columns > 1 and self.plan.config.compress_turns == "every":
            self.record.prompt_tokens[:] = self._tokens_seen(seen + columns)
            self.record.appended_rows = 0
        else:
            self.record.appended_rows += sum(self.chunk.lengths) if self.chunk.lengths else batch * columns

    # -- decode steps without host work -----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that every list of every layer can still take before a buffer has to move."""
        return min(layer.room for layer in self.layers)

    def begin_steps(self, *, watched: bool = False) -> None:
        """Let the coming forwards each append one token of every sequence and touch nothing but the device.

        Such a forward can be captured in a CUDA graph and replayed. It needs `room`, and `count_steps` once it has run.
        `watched` is for steps that are not captured: the layers' accounts are then right while a step still runs.
        """
        if self.batch_size < 0:
            raise CacheError("decode steps need a prompt in the cache; run the prompt through the model first")
        self.chunk = Chunk.of_step(self.batch_size, counted=watched)

    def count_steps(self, steps: int) -> None:
        """Account on the host for `steps` forwards since `begin_steps` or the last call."""
        if not self.chunk.counted:
            for layer in self.layers:
                layer.count(steps)
        batch = self.batch_size
        self.record.appended_rows += steps * batch
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(batch, steps)], dim=1)

    def grow(self, rows: int) -> None:
        """Make room for at least `rows` more tokens. Buffers move: graphs captured before must not be replayed."""
        for layer in self.layers:
            layer.grow(rows)

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first prompt."""
        first = self.layers[0]
        return first.lens.shape[0] // self.plan.num_kv_heads if first.is_initialized else -1

    def _tokens_seen(self, columns: int) -> list[int]:
        if self.attention_mask is None:
            return [columns] * self.batch_size
        return self.attention_mask.sum(1).tolist()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns: a negative count, or (as transformers < 5.20 calls it) a positive final size.

        Raises:
            CacheError: The columns reach into a compressed prompt, whose dropped rows cannot be brought back.
        """
        seen = self.get_seq_length()
        columns = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if columns == 0 or seen == 0:
            return
        removable = self.layers[0].removable
        if columns > removable:
            raise CacheError(
                f"cannot take back {columns} of {seen} cached columns: only the last {removable} were appended after "
                "the prompt was compressed"
            )
        batch = self.batch_size
        if self.attention_mask is None:
            rows = torch.full((batch,), columns, dtype=torch.int32)
        else:
            kept = self.attention_mask[:, : seen - columns]
            rows = self.attention_mask[:, seen - columns : seen].sum(1, dtype=torch.int32)
            self.attention_mask = kept
        for layer in self.layers:
            layer.remove_columns(columns, rows)
        self.record.appended_rows = max(0, self.record.appended_rows - int(rows.sum()))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (repeats allowed)."""
        batch = self.batch_size
        super().batch_select_indices(indices)
        for name in ("attention_mask", "rope_deltas"):
            tensor = getattr(self, name)
            if tensor is not None and batch > 0:
                # Sampling and beams expand the prompts after the M-RoPE offsets were computed: one row serves several.
                tensor = tensor.repeat_interleave(batch // tensor.shape[0], dim=0)
                setattr(self, name, tensor[indices.to(tensor.device)])

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Give beam i the rows of beam `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

"""The rows of one layer: two flat buffers in which every (batch row, kv head) owns its own range (spec section 7)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsemm.cache.chunk import Chunk, Columns
from sparsemm.cache.selection import KeptRows, choose_rows, is_covered, keep_best, score_layer
from sparsemm.cache.stats import CacheRecord
from sparsemm.errors import CacheError
from sparsemm.methods import PromptStates
from sparsemm.ops.backends import DecodeBackend, VarlenDecode, operators, overload, resolve_backend
from sparsemm.ops.chunk import MAX_DECODE_QUERIES, causal_attention, merge_attention
from sparsemm.plan import GROWTH_ROWS, Plan

GROWTH_SHARE = 8  # a full cache grows by at least 1/8, so that growing costs a constant share of appending


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


class SparseLayer(CacheLayerMixin):
    """Rows of one layer. `offsets`, `lens` and the buffers follow the layout of `sparsemm.ops.schemas`."""

    is_compileable = False
    is_croppable = False  # only what was appended behind a compressed prompt can be taken back
    supports_early_init = False
    is_sliding = False

    def __init__(self, plan: Plan, layer_idx: int, record: CacheRecord) -> None:
        super().__init__()
        self.plan, self.layer_idx, self.record = plan, layer_idx, record
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.offsets: Tensor | None = None
        self.lens: Tensor | None = None
        self.overflow: Tensor | None = None
        self.seen = 0  # columns fed, padding included
        # A list holds `kept` rows, and the tokens of the columns from `filled` on; so `restore` needs nobody to count.
        self.kept: Tensor | None = None  # int32 [batch * num_kv_heads], as are the prompt rows kept last
        self.prompt_rows: Tensor | None = None
        self.filled = 0
        self.frozen = 0  # the columns whose rows were chosen among, which `crop` cannot take back
        self.capacity = 0  # columns for which every list has slots, known without asking the device
        self.torn = False  # rows are being moved; left True by an exception
        self.waiting: tuple[Tensor, Tensor] | None = None  # what `score_layer` found, until the last layer has run
        self.record.layer_bytes[self.layer_idx] = 0

    @property
    def removable(self) -> int:
        """Columns that `crop` can take back."""
        return self.seen - self.frozen

    @property
    def room(self) -> int:
        """Tokens that every list can still take."""
        return self.capacity - self.seen

    # -- what transformers asks -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CacheError("a SparseCache is filled by the attention forward that sparsemm.patch installs")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise CacheError(
            "this model is not (or no longer) patched, so it cannot use a SparseCache; "
            "keep sparsemm.patch(model, config) active while the cache is in use, or start without past_key_values"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    # -- filling and reading --------------------------------------------------------------------------------------

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
            out, _ = self._decode(query, scale, chunk.num_later)
        else:
            none_later = torch.zeros(chunk.batch, chunk.columns, dtype=torch.int32, device=query.device)
            kept = self._decode(query, scale, none_later)
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

    def rotate_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        num_later: Tensor | None,
        rotation: tuple[Any, ...],
    ) -> Tensor:
        """`attend` for one token of every sequence before its rotation, in steps that are counted afterwards.

        `rotation`: The last arguments of `rope_append`, from the weights of its norms on.
        """
        place = (query.device, query.dtype, query.shape[-1])
        rope_append, decode = _rope_append(*place), _varlen_decode(self.plan.decode_backend, *place)
        key_buffer, value_buffer, offsets, lens = self.key_buffer, self.value_buffer, self.offsets, self.lens
        query = rope_append(
            query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, self.overflow, None, *rotation
        )
        out, _ = decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later)
        return out

    def _decode(self, query: Tensor, scale: float, num_later: Tensor | None) -> tuple[Tensor, Tensor]:
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

    def memory_bytes(self) -> int:
        """Bytes of the buffers, slack included, and of the index tensors."""
        tensors = (
            self.key_buffer,
            self.value_buffer,
            self.offsets,
            self.lens,
            self.kept,
            self.prompt_rows,
            self.overflow,
        )
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _fill(self, key: Tensor, value: Tensor, rows: KeptRows, columns: int, *, frozen: int) -> None:
        """Move the chosen rows of key and value `[B, Hkv, T, D]` into new buffers with `plan.reserve` rows of slack a
        list; `columns` is how many were fed by then."""
        self.torn = True
        reserve, lists = self.plan.reserve, rows.kept.numel()
        self.offsets = rows.cu_kept + reserve * torch.arange(lists + 1, dtype=torch.int32, device=key.device)
        shape = (rows.total + reserve * lists, key.shape[-1])
        self.key_buffer, self.value_buffer = key.new_empty(shape), value.new_empty(shape)
        operators(key.device, key.dtype, key.shape[-1]).compact(
            key, value, rows.positions, rows.cu_kept, self.offsets, self.key_buffer, self.value_buffer
        )
        self.lens, self.kept, self.prompt_rows = (rows.kept.reshape(-1).clone() for _ in range(3))
        self.overflow = torch.zeros(1, dtype=torch.int32, device=key.device)
        self.seen = self.filled = columns
        self.capacity, self.frozen = columns + reserve, frozen
        self.is_initialized = True
        self.record.row_bytes = 2 * key.shape[-1] * key.element_size()
        self._note_bytes()
        self.torn = False

    def _note_bytes(self) -> None:
        self.record.layer_bytes[self.layer_idx] = self.memory_bytes()

    def _append(self, key: Tensor, value: Tensor, chunk: Chunk) -> None:
        if chunk.counted and chunk.columns > self.room:
            self.grow(chunk.columns)
        operators(key.device, key.dtype, key.shape[-1]).append(
            key, value, self.offsets, self.lens, self.key_buffer, self.value_buffer, self.overflow, chunk.mask
        )
        if chunk.counted:
            self.seen += chunk.columns

    def grow(self, rows: int) -> None:
        """Give every list at least `rows` more slots behind its slack. The buffers move."""
        if bool(self.overflow.item()):
            raise CacheError(
                "rows were lost because a list of the cache was full; this is a bug in the cache's accounting"
            )
        self._spread(max(rows, GROWTH_ROWS, self.key_buffer.shape[0] // self.lens.shape[0] // GROWTH_SHARE))

    def _spread(self, extra: int) -> None:
        """Move every row into new buffers with `extra` more slots a list."""
        lists, slots = self.lens.shape[0], self.key_buffer.shape[0]
        slot = torch.arange(slots, device=self.offsets.device, dtype=torch.int32)
        moved = slot + extra * torch.searchsorted(self.offsets[1:], slot, right=True, out_int32=True)
        for name in ("key_buffer", "value_buffer"):  # the old one is freed before the next is made
            old = getattr(self, name)
            new = old.new_empty(slots + extra * lists, old.shape[1]).index_copy_(0, moved.long(), old)
            self.torn = True
            setattr(self, name, new)
            del old, new
        self.offsets = self.offsets + extra * torch.arange(lists + 1, dtype=torch.int32, device=self.offsets.device)
        self.capacity += extra
        self._note_bytes()
        self.torn = False

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

    def _held(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """All rows, right-aligned: key and value `[batch, own kv heads, width, D]`, and where each list starts."""
        lens = self.lens.cpu()
        width = int(lens.max())
        if self.plan.parallel.divided and self.plan.method.layer_budgets is not None:
            width = max(self.plan.parallel.collect(width))  # scores of all heads are to lie side by side
        slots = self.offsets[:-1, None] + self.lens[:, None] - width
        slots = (slots + torch.arange(width, device=slots.device)).clamp(min=0)
        shape = (batch, self.plan.own_kv_heads)
        key, value = (buffer[slots].view(*shape, width, -1) for buffer in (self.key_buffer, self.value_buffer))
        return key, value, (width - lens).view(shape)

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

    # -- beams, batches, taking back ------------------------------------------------------------------------------

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (repeats allowed), as for beam search or to drop finished sequences."""
        if not self.is_initialized:
            return
        num_kv_heads = self.plan.own_kv_heads
        chosen = indices.tolist()
        begins = self.offsets[::num_kv_heads].tolist()
        self.key_buffer, self.value_buffer = (
            torch.cat([buffer[begins[b] : begins[b + 1]] for b in chosen])
            for buffer in (self.key_buffer, self.value_buffer)
        )
        index = indices.to(self.lens.device)
        capacity = self.offsets.diff().view(-1, num_kv_heads)[index].reshape(-1)
        self.offsets = torch.nn.functional.pad(capacity.cumsum(0, dtype=torch.int32), (1, 0))
        self.lens, self.kept, self.prompt_rows = (
            tensor.view(-1, num_kv_heads)[index].reshape(-1) for tensor in (self.lens, self.kept, self.prompt_rows)
        )
        self._note_bytes()

    def restore(self, columns: Columns, fed: Columns) -> None:
        """Take back what was fed behind `columns`, of all that was `fed`. Nothing moves.

        Not behind columns that were chosen among.
        """
        self.waiting = None
        if columns.count < self.filled:
            self.kept = self.kept - self._per_list(fed.tokens(columns.count, self.filled))
            # The tokens taken back leave slots only in lists that held them: none is counted on.
            self.capacity -= self.filled - columns.count
            self.filled = columns.count
        self.lens.copy_(self.kept + self._per_list(columns.tokens(self.filled)))
        self.seen = columns.count

    def _per_list(self, tokens: Tensor | int) -> Tensor | int:
        """A value of each batch row, for each of its lists."""
        if isinstance(tokens, int):
            return tokens
        return tokens.to(self.lens.device).repeat_interleave(self.plan.own_kv_heads)

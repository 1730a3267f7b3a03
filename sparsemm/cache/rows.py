"""The rows of one layer: two flat buffers in which every (batch row, kv head) owns its own range (spec section 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsemm.cache.chunk import Chunk, Columns
from sparsemm.cache.selection import KeptRows
from sparsemm.cache.stats import CacheRecord
from sparsemm.errors import CacheError
from sparsemm.ops.backends import operators
from sparsemm.plan import GROWTH_ROWS, Plan

GROWTH_SHARE = 8  # a full cache grows by at least 1/8, so that growing costs a constant share of appending


class RowLists(CacheLayerMixin):
    """Row lists that are filled, grow and move; which rows are worth keeping, `SparseLayer` knows.

    `offsets`, `lens` and the buffers follow the layout of `sparsemm.ops.schemas`.
    """

    is_compileable = False
    is_croppable = False  # only what was appended behind a compressed prompt can be taken back
    supports_early_init = False
    is_sliding = False

    def __init__(self, plan: Plan, layer_idx: int, record: CacheRecord) -> None:
        super().__init__()
        self.plan, self.layer_idx, self.record = plan, layer_idx, record
        self.reset()

    def reset(self) -> None:
        """Let go of every row."""
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

    # -- filling, growing, reading --------------------------------------------------------------------------------

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

    def _note_bytes(self) -> None:
        self.record.layer_bytes[self.layer_idx] = self.memory_bytes()

    def _append(self, key: Tensor, value: Tensor, chunk: Chunk) -> None:
        """Put the chunk's tokens, key and value `[B, Hkv, n, D]`, behind the rows of their lists."""
        if chunk.counted and chunk.columns > self.room:
            self.grow(chunk.columns)
        operators(key.device, key.dtype, key.shape[-1]).append(
            key, value, self.offsets, self.lens, self.key_buffer, self.value_buffer, self.overflow, chunk.mask
        )
        if chunk.counted:
            self.seen += chunk.columns

    def grow(self, rows: int) -> None:
        """Give every list at least `rows` more slots behind its slack. The buffers move.

        Raises `CacheError` where an earlier append found no slot.
        """
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

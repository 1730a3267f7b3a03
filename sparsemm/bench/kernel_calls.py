"""What the kernel benchmark times: tensors of a cell, each operator of this package and its contestants on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsemm
from sparsemm.bench.shapes import AttentionShape
from sparsemm.head_scores import HeadScores
from sparsemm.ops import backends, reference

Calls = dict[str, Callable[[], Any]]

WINDOW = 32


def row_counts(
    shape: AttentionShape, budget: int | None, prompt: int, distribution: str, scores: HeadScores
) -> list[int]:
    """Rows per kv head in one layer: `skewed` as SparseMM gives them in the layer whose total is closest to the mean,
    `uniform` the same total spread evenly; `budget` None keeps the whole prompt."""
    if budget is None or budget >= prompt:
        return [prompt] * shape.kv_heads
    config = sparsemm.CompressionConfig("sparsemm", budget, head_scores=scores, window_size=min(WINDOW, budget))
    rows = sparsemm.head_budgets(
        config,
        num_layers=shape.layers,
        num_query_heads=shape.query_heads,
        num_kv_heads=shape.kv_heads,
        prompt_length=prompt,
    )
    totals = rows.sum(1)
    counts = rows[int((totals - budget * shape.kv_heads).abs().argmin())].tolist()
    if distribution == "skewed":
        return counts
    total = sum(counts)
    return [total // shape.kv_heads + (i < total % shape.kv_heads) for i in range(shape.kv_heads)]


@dataclass
class Workspace:
    """Random tensors for one cell's calls.

    Attributes:
        shape: Attention of the model.
        batch, prompt: Sequences, and prompt tokens of each.
        counts: Rows of every (sequence, kv head).
        device, dtype: Of the tensors.
        slack: Free slots behind every list of rows.
        intermediate_size: Of the model's MLP.
    """

    shape: AttentionShape
    batch: int
    prompt: int
    counts: list[int]
    device: torch.device
    dtype: torch.dtype
    slack: int = 64
    intermediate_size: int = 2816

    def __post_init__(self) -> None:
        self.window = min(WINDOW, self.prompt, min(self.counts))
        self.row_bytes = 2 * self.shape.head_dim * self.dtype.itemsize  # a key and a value

    @property
    def prompt_bytes(self) -> int:
        """Keys and values of the whole prompts in one layer."""
        return self.batch * self.shape.kv_heads * self.prompt * self.row_bytes

    @property
    def held_bytes(self) -> int:
        """Rows held, slack excluded."""
        return sum(self.counts) * self.row_bytes

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def rows(self) -> dict[str, Tensor]:
        """A ragged cache of one layer: buffers `[slots, D]`, offsets, lens as in ops/schemas.py."""
        lens = torch.tensor(self.counts, dtype=torch.int32)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int32), (lens + self.slack).cumsum(0).int()])
        buffers = {name: self.random(int(offsets[-1]), self.shape.head_dim) for name in ("key_buffer", "value_buffer")}
        return {**buffers, "offsets": offsets.to(self.device), "lens": lens.to(self.device)}

    def prompt_states(self) -> Tensor:
        """`[batch, kv_heads, prompt, D]`."""
        return self.random(self.batch, self.shape.kv_heads, self.prompt, self.shape.head_dim)

    def ends(self) -> Tensor:
        """int32 `[lists + 1]`: where the lists of rows begin when they lie end to end."""
        return torch.tensor([0, *self.counts]).cumsum(0).int().to(self.device)


def decode_calls(work: Workspace) -> tuple[Calls, int]:
    """One decode step of one layer by every backend that can serve here; and the bytes that it must move."""
    query, rows = work.random(work.batch, work.shape.query_heads, 1, work.shape.head_dim), work.rows()
    calls: Calls = {}
    place = (work.device, work.dtype, work.shape.head_dim)
    for name in backends.BACKENDS[:-1]:
        if name == "reference" and work.device.type == "cuda":
            continue  # reads lengths on the host; not a contestant
        if backends.missing_reason(name, *place) is None:
            decode = backends.resolve_backend(name, *place).varlen_decode
            calls[name] = lambda decode=decode: decode(query, **rows, scale=work.shape.head_dim**-0.5)
    return calls, work.held_bytes + 2 * query.nbytes


def append_calls(work: Workspace) -> tuple[Calls, int]:
    """One new row per head: in place, and as the original does it, by copying the whole cache."""
    new, rows = work.random(work.batch, work.shape.kv_heads, 1, work.shape.head_dim), work.rows()
    overflow = torch.zeros(1, dtype=torch.int32, device=work.device)
    begins = rows["offsets"].tolist()
    flat = new.reshape(len(work.counts), 1, work.shape.head_dim)

    def original() -> None:
        for buffer in (rows["key_buffer"], rows["value_buffer"]):
            pieces = []
            for r, (begin, length) in enumerate(zip(begins, work.counts, strict=False)):
                pieces += [buffer[begin : begin + length], flat[r]]
            torch.cat(pieces)

    own = lambda: torch.ops.sparsemm.append.default(new, new, **rows, overflow=overflow)  # noqa: E731
    return {"sparsemm": own, "original": original}, 2 * len(work.counts) * work.row_bytes


def compact_calls(work: Workspace) -> tuple[Calls, int]:
    """The chosen rows of a prompt into the flat buffers: one launch, and a gather per head."""
    key, value, rows = work.prompt_states(), work.prompt_states(), work.rows()
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(work.prompt, generator=generator)[:count].sort().values for count in work.counts]
    positions, cu_kept = torch.cat(lists).int().to(work.device), work.ends()
    lists, heads = [each.to(work.device) for each in lists], work.shape.kv_heads
    arguments = (key, value, positions, cu_kept, rows["offsets"], rows["key_buffer"], rows["value_buffer"])

    def original() -> None:
        for states in (key, value):
            torch.cat([states[r // heads, r % heads].index_select(0, index) for r, index in enumerate(lists)])

    own = lambda: torch.ops.sparsemm.compact.default(*arguments)  # noqa: E731
    return {"sparsemm": own, "original": original}, 2 * work.held_bytes


def window_calls(work: Workspace) -> tuple[Calls, int]:
    """Scores of the last w queries: fused, and in plain PyTorch."""
    query, key = work.random(work.batch, work.shape.query_heads, work.window, work.shape.head_dim), work.prompt_states()
    starts = torch.zeros(work.batch, work.shape.kv_heads, dtype=torch.int32, device=work.device)
    num_queries = torch.full((work.batch,), work.window, dtype=torch.int32, device=work.device)
    arguments = (query, key, starts, num_queries, work.shape.head_dim**-0.5)
    calls = {
        "sparsemm": lambda: torch.ops.sparsemm.window_scores.default(*arguments),
        "reference": lambda: reference.window_scores(*arguments),
    }
    return calls, key.nbytes + query.nbytes + 4 * starts.numel() * work.prompt


def select_calls(work: Workspace) -> tuple[Calls, int]:
    """The best columns of every list in order: batched, in plain PyTorch, and in a loop over heads."""
    window, counts, columns = work.window, work.counts, work.prompt - work.window
    scores = torch.rand(len(counts), columns, device=work.device)
    starts = torch.zeros(len(counts), dtype=torch.int32, device=work.device)
    chosen = torch.tensor(counts, dtype=torch.int32, device=work.device) - window
    arguments = (scores, starts, chosen, window, work.ends(), sum(counts))
    recent = torch.arange(columns, work.prompt, device=work.device)

    def original() -> None:
        for r, count in enumerate(counts):
            torch.cat([scores[r].topk(count - window).indices.sort().values, recent])

    calls = {
        "sparsemm": lambda: torch.ops.sparsemm.select_rows.default(*arguments),
        "reference": lambda: reference.select_rows(*arguments),
        "original": original,
    }
    return calls, scores.nbytes + 4 * sum(counts)


def norm_calls(work: Workspace) -> tuple[Calls, int]:
    """The residual addition and the norm of one token: at once, and by PyTorch's own fused norm."""
    hidden_size = work.shape.query_heads * work.shape.head_dim
    states, residual, weight = (work.random(*size, hidden_size) for size in ((work.batch,), (work.batch,), ()))

    def pytorch() -> None:
        torch.nn.functional.rms_norm(states + residual, (hidden_size,), weight, 1e-6)

    own = lambda: torch.ops.sparsemm.add_rms_norm.default(states, residual, weight, 1e-6)  # noqa: E731
    return {"sparsemm": own, "pytorch": pytorch}, 4 * states.nbytes + weight.nbytes


def rotate_calls(work: Workspace) -> tuple[Calls, int]:
    """Rotating query and key of one token and appending it: at once, and in PyTorch with `append` behind."""
    query, key = (work.random(work.batch, heads, 1, work.shape.head_dim) for heads in
                  (work.shape.query_heads, work.shape.kv_heads))  # fmt: skip
    cos, sin = (work.random(work.batch, 1, work.shape.head_dim) for _ in range(2))
    rows, overflow = work.rows(), torch.zeros(1, dtype=torch.int32, device=work.device)
    half = work.shape.head_dim // 2

    def rotated(states: Tensor) -> Tensor:
        turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
        return (states * cos[:, None]).addcmul_(turned, sin[:, None])

    def pytorch() -> None:
        rotated(query)
        torch.ops.sparsemm.append.default(rotated(key), key, **rows, overflow=overflow)

    own = lambda: torch.ops.sparsemm.rope_append.default(query, key, key, cos, sin, **rows, overflow=overflow)  # noqa: E731
    return {"sparsemm": own, "pytorch": pytorch}, 2 * query.nbytes + 4 * key.nbytes + 2 * cos.nbytes


def gated_calls(work: Workspace) -> tuple[Calls, int]:
    """The gated activation of one token's MLP: at once, and in PyTorch."""
    gate, up = (work.random(work.batch, work.intermediate_size) for _ in range(2))
    own = lambda: torch.ops.sparsemm.silu_mul.default(gate, up)  # noqa: E731
    return {"sparsemm": own, "pytorch": lambda: torch.nn.functional.silu(gate).mul_(up)}, 3 * gate.nbytes


CALLS: dict[str, Callable[[Workspace], tuple[Calls, int]]] = {
    "decode": decode_calls,
    "append": append_calls,
    "compact": compact_calls,
    "window_scores": window_calls,
    "select": select_calls,
    "add_rms_norm": norm_calls,
    "rope_append": rotate_calls,
    "silu_mul": gated_calls,
}
"""By operation: its contestants on fresh tensors, and the bytes that one call must move."""

ONE_TOKEN = ("add_rms_norm", "rope_append", "silu_mul")
"""Operations that do not depend on how many rows there are."""

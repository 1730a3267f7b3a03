"""The calls that the kernel benchmark times: each operator of this package beside its contestants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsemm.bench.kernel_cases import SHAPES, Cell, Rows, ragged_rows, random_selection
from sparsemm.ops import backends, reference


def decode_calls(rows: Rows, query: Tensor, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One decode step of one layer by every backend that can serve here."""
    scale = query.shape[-1] ** -0.5
    for name in backends.BACKENDS[:-1]:
        if backends.missing_reason(name, device, query.dtype, query.shape[-1]) is not None:
            continue
        if name == "reference" and device.type == "cuda":
            continue  # reads lengths on the host; not a contestant
        decode = backends.resolve_backend(name, device, query.dtype, query.shape[-1]).varlen_decode
        yield (
            name,
            lambda decode=decode: decode(query, rows.key_buffer, rows.value_buffer, rows.offsets, rows.lens, scale),
        )


def append_calls(rows: Rows, new: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One new row per head: in place, and as the original does it, by copying the whole cache."""
    overflow = torch.zeros(1, dtype=torch.int32, device=new.device)

    def own() -> None:
        torch.ops.sparsemm.append(new, new, rows.offsets, rows.lens, rows.key_buffer, rows.value_buffer, overflow)

    lengths, begins = rows.lens.tolist(), rows.offsets.tolist()
    flat = new.reshape(len(lengths), 1, new.shape[-1])

    def original() -> None:
        for buffer in (rows.key_buffer, rows.value_buffer):
            pieces = []
            for r, (begin, length) in enumerate(zip(begins, lengths, strict=False)):
                pieces += [buffer[begin : begin + length], flat[r]]
            torch.cat(pieces)

    yield "sparsemm", own
    yield "original", original


def compact_calls(
    key: Tensor, value: Tensor, counts: list[int], target: Rows
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The chosen rows of a prompt into the flat buffers: one launch, and a gather per head."""
    positions, cu_kept = random_selection(counts, key.shape[2], key.device)
    arguments = (key, value, positions, cu_kept, target.offsets, target.key_buffer, target.value_buffer)
    lists = list(positions.long().split(counts))
    heads = key.shape[1]

    def original() -> None:
        for states in (key, value):
            torch.cat([states[r // heads, r % heads].index_select(0, index) for r, index in enumerate(lists)])

    yield "sparsemm", lambda: torch.ops.sparsemm.compact(*arguments)
    yield "original", original


def window_calls(query: Tensor, key: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Scores of the last w queries: fused, and in plain PyTorch."""
    batch, heads = key.shape[:2]
    starts = torch.zeros(batch, heads, dtype=torch.int32, device=key.device)
    num_queries = torch.full((batch,), query.shape[2], dtype=torch.int32, device=key.device)
    arguments = (query, key, starts, num_queries, query.shape[-1] ** -0.5)
    yield "sparsemm", lambda: torch.ops.sparsemm.window_scores(*arguments)
    yield "reference", lambda: reference.window_scores(*arguments)


def select_calls(scores: Tensor, counts: list[int], window: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The best columns of every list in order: batched, in plain PyTorch, and in a loop over heads."""
    device, lists = scores.device, len(counts)
    starts = torch.zeros(lists, dtype=torch.int32, device=device)
    chosen = torch.tensor(counts, dtype=torch.int32, device=device) - window
    cu_kept = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    arguments = (scores, starts, chosen, window, cu_kept, sum(counts))
    recent = torch.arange(scores.shape[1], scores.shape[1] + window, device=device)

    def original() -> None:
        for r, count in enumerate(counts):
            torch.cat([scores[r].topk(count - window).indices.sort().values, recent])

    yield "sparsemm", lambda: torch.ops.sparsemm.select_rows(*arguments)
    yield "reference", lambda: reference.select_rows(*arguments)
    yield "original", original


def contestants_of(
    cell: Cell, counts: list[int], window: int, device: torch.device, dtype: torch.dtype, slack: int = 64
) -> tuple[list[tuple[str, Callable[[], Any]]], int]:
    """The contestants of a cell on fresh tensors, and the bytes one call must move."""
    shape = SHAPES[cell.shape]
    heads, dim = shape.kv_heads, shape.head_dim
    row_bytes = 2 * dim * torch.empty(0, dtype=dtype).element_size()  # a key and a value
    random_ = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
    if cell.operation == "decode":
        query = random_(cell.batch, shape.query_heads, 1, dim)
        moved = sum(counts) * row_bytes + 2 * query.nbytes
        return list(decode_calls(ragged_rows(counts, dim, dtype, device), query, device)), moved
    if cell.operation == "append":
        rows, new = ragged_rows(counts, dim, dtype, device, slack), random_(cell.batch, heads, 1, dim)
        return list(append_calls(rows, new)), 2 * len(counts) * row_bytes
    if cell.operation == "select":
        columns = cell.prompt - window
        scores = torch.rand(len(counts), columns, device=device)
        return list(select_calls(scores, counts, window)), scores.nbytes + 4 * sum(counts)
    key = random_(cell.batch, heads, cell.prompt, dim)
    if cell.operation == "window_scores":
        query = random_(cell.batch, shape.query_heads, window, dim)
        return list(window_calls(query, key)), key.nbytes + query.nbytes + 4 * cell.batch * heads * cell.prompt
    value = random_(cell.batch, heads, cell.prompt, dim)
    return list(compact_calls(key, value, counts, ragged_rows(counts, dim, dtype, device))), 2 * sum(counts) * row_bytes

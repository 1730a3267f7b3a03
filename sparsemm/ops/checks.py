"""Argument checks shared by the operators' Python twins: a mismatch is an error that names it, never memory read as
something else."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.errors import OperatorError

_ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OperatorError(message)


def _check_index(name: str, tensor: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    _require(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
    _require(tensor.device == device, f"{name} is on {tensor.device}, the rows are on {device}; move it there")
    if shape is not None:
        _require(tuple(tensor.shape) == shape, f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_rows(key: Tensor, value: Tensor) -> None:
    _require(key.dim() == 4, f"key must be [B, Hkv, T, D], got {list(key.shape)}")
    _require(key.shape == value.shape, f"key {list(key.shape)} and value {list(value.shape)} must have one shape")
    _require(key.dtype == value.dtype, f"key is {key.dtype} and value {value.dtype}; they must have one dtype")
    _require(key.dtype in _ROW_DTYPES, f"rows must be floating point of 16 to 64 bits, got {key.dtype}")
    _require(key.device == value.device, f"key is on {key.device} and value on {value.device}")


def _check_buffers(rows: Tensor, key_buffer: Tensor, value_buffer: Tensor) -> None:
    _require(
        key_buffer.dim() == 2 and key_buffer.shape[1] == rows.shape[-1],
        f"key_buffer must be [slots, {rows.shape[-1]}], got {list(key_buffer.shape)}",
    )
    _require(
        key_buffer.shape == value_buffer.shape,
        f"key_buffer {list(key_buffer.shape)} and value_buffer {list(value_buffer.shape)} must have one shape",
    )
    for name, buffer in (("key_buffer", key_buffer), ("value_buffer", value_buffer)):
        _require(buffer.dtype == rows.dtype, f"{name} is {buffer.dtype}, the rows are {rows.dtype}")
        _require(buffer.device == rows.device, f"{name} is on {buffer.device}, the rows are on {rows.device}")
        _require(buffer.is_contiguous(), f"{name} must be contiguous")


def check_compact(key, value, positions, cu_kept, offsets, key_buffer, value_buffer) -> None:
    _check_rows(key, value)
    _check_buffers(key, key_buffer, value_buffer)
    lists = key.shape[0] * key.shape[1]
    _require(positions.dim() == 1, f"positions must be [total], got {list(positions.shape)}")
    _check_index("positions", positions, None, key.device)
    _check_index("cu_kept", cu_kept, (lists + 1,), key.device)
    _check_index("offsets", offsets, (lists + 1,), key.device)


def check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask) -> None:
    _check_rows(key, value)
    _check_buffers(key, key_buffer, value_buffer)
    lists = key.shape[0] * key.shape[1]
    _check_index("offsets", offsets, (lists + 1,), key.device)
    _check_index("lens", lens, (lists,), key.device)
    _check_index("overflow", overflow, (1,), key.device)
    if mask is not None:
        _require(mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}")
        _require(mask.device == key.device, f"mask is on {mask.device}, the rows are on {key.device}")
        expected = (key.shape[0], key.shape[2])
        _require(tuple(mask.shape) == expected, f"mask must have shape {list(expected)}, got {list(mask.shape)}")


def check_varlen_decode(query, key_buffer, value_buffer, offsets, lens, num_later) -> None:
    _require(query.dim() == 4, f"query must be [B, Hq, n, D], got {list(query.shape)}")
    _check_buffers(query, key_buffer, value_buffer)
    batch, num_query_heads, n, _ = query.shape
    lists = lens.shape[0]
    _require(
        batch > 0 and lists % batch == 0 and lists > 0 and num_query_heads % (lists // batch) == 0,
        f"{lists} row lists do not divide among batch {batch} and {num_query_heads} query heads",
    )
    _check_index("offsets", offsets, (lists + 1,), query.device)
    _check_index("lens", lens, (lists,), query.device)
    if num_later is not None:
        _check_index("num_later", num_later, (batch, n), query.device)


def check_window_scores(query, key, starts, num_queries) -> None:
    _require(query.dim() == 4 and key.dim() == 4, "query must be [B, Hq, w, D] and key [B, Hkv, T, D]")
    _require(
        query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[1] % key.shape[1] == 0,
        f"query {list(query.shape)} and key {list(key.shape)} do not belong together",
    )
    _require(query.shape[2] <= key.shape[2], f"{query.shape[2]} window queries over only {key.shape[2]} columns")
    _require(query.dtype == key.dtype, f"query is {query.dtype} and key {key.dtype}")
    _check_index("starts", starts, tuple(key.shape[:2]), key.device)
    _check_index("num_queries", num_queries, (key.shape[0],), key.device)


def check_select_rows(scores, starts, counts, window, cu_kept, total) -> None:
    _require(scores.dim() == 2 and scores.dtype == torch.float32, f"scores must be float32 [R, C], got {scores.dtype}")
    lists = scores.shape[0]
    _check_index("starts", starts, (lists,), scores.device)
    _check_index("counts", counts, (lists,), scores.device)
    _check_index("cu_kept", cu_kept, (lists + 1,), scores.device)
    _require(window >= 0 and total >= 0, f"window {window} and total {total} must not be negative")

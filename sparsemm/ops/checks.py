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


def check_add_rms_norm(x, residual, weight) -> None:
    _require(x.dim() >= 1 and x.is_contiguous(), f"x must be contiguous [..., H], got {list(x.shape)}")
    _require(x.dtype in _ROW_DTYPES, f"rows must be floating point of 16 to 64 bits, got {x.dtype}")
    _require(
        tuple(weight.shape) == (x.shape[-1],) and weight.is_contiguous(),
        f"weight must be [{x.shape[-1]}], got {list(weight.shape)}",
    )
    if residual is not None:
        _require(
            residual.shape == x.shape and residual.is_contiguous(),
            f"residual must be contiguous and have the shape of x, {list(x.shape)}, got {list(residual.shape)}",
        )
    for name, each in (("residual", residual), ("weight", weight)):
        if each is not None:
            _require(each.dtype == x.dtype, f"{name} is {each.dtype}, x is {x.dtype}")
            _require(each.device == x.device, f"{name} is on {each.device}, x is on {x.device}")


def check_rope_append(
    query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask, query_weight, key_weight
) -> None:
    check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask)
    batch, num_kv_heads, n, head_dim = key.shape
    _require(
        query.dim() == 4 and (query.shape[0], *query.shape[2:]) == (batch, n, head_dim),
        f"query {list(query.shape)} and key {list(key.shape)} do not belong together",
    )
    _require(
        cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == n,
        f"cos must be [{batch} or 1, {n}, R], got {list(cos.shape)}",
    )
    _require(
        cos.shape[2] % 2 == 0 and cos.shape[2] <= head_dim,
        f"{cos.shape[2]} dimensions cannot be rotated of {head_dim}; an even number is needed",
    )
    _require(sin.shape == cos.shape, f"cos {list(cos.shape)} and sin {list(sin.shape)} must have one shape")
    _require((query_weight is None) == (key_weight is None), "query_weight and key_weight go together")
    for name, each in (("query", query), ("cos", cos), ("sin", sin), ("query_weight", query_weight),
                       ("key_weight", key_weight)):  # fmt: skip
        if each is not None:
            _require(each.dtype == key.dtype, f"{name} is {each.dtype}, key is {key.dtype}")
            _require(each.device == key.device, f"{name} is on {each.device}, key is on {key.device}")
    for name, each in (("query_weight", query_weight), ("key_weight", key_weight)):
        if each is not None:
            _require(tuple(each.shape) == (head_dim,), f"{name} must be [{head_dim}], got {list(each.shape)}")


def check_gated(gate, up) -> None:
    _require(gate.dtype in _ROW_DTYPES, f"rows must be floating point of 16 to 64 bits, got {gate.dtype}")
    _require(
        gate.dim() >= 1 and gate.shape == up.shape,
        f"gate {list(gate.shape)} and up {list(up.shape)} must have one shape",
    )
    _require(gate.dtype == up.dtype, f"gate is {gate.dtype} and up {up.dtype}; they must have one dtype")
    _require(gate.device == up.device, f"gate is on {gate.device} and up on {up.device}")

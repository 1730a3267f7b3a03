"""Schemas of the ragged-row operators, the one place where `torch.ops.sparsemm` is defined.

Ragged layout: the rows of a layer live in one flat key and one flat value buffer `[slots, head_dim]`. Row list r = b *
Hkv + h
(batch row b, kv head h) owns the slots `offsets[r] .. offsets[r + 1] - 1`, of which the first `lens[r]` hold rows, the
rest is slack.
`offsets` is int32 `[B * Hkv + 1]`, `lens` int32 `[B * Hkv]`, both on the device of the buffers.

compact(key, value, positions, cu_kept, offsets, key_buffer!, value_buffer!)
    key, value `[B, Hkv, T, D]` (any strides, last dim contiguous); positions int32 `[total]`, the kept columns of row
    list 0, then 1, …;
    cu_kept int32 `[B * Hkv + 1]`, where each list begins in `positions`. Copies key[b, h, positions[i]] to slot
    offsets[r] + (i - cu_kept[r]).
append(key, value, offsets, lens!, key_buffer!, value_buffer!, overflow!, mask=None)
    key, value `[B, Hkv, n, D]`, mask bool `[B, n]` (True = store; None = all). Writes the masked-in columns of every
    row list, in order,
    behind its rows and advances `lens`. A list without room sets overflow int32 `[1]` to 1 and is left as it was.
varlen_decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later=None) -> (out, lse)
    query `[B, Hq, n, D]`; query head j reads kv head j // (Hq // Hkv). Query i sees the first lens[r] - num_later[b,
    i] rows;
    num_later int32 `[B, n]`, None means n - 1 - i (causal among the last n rows). out `[B, Hq, n, D]` in the dtype of
    query,
    lse float32 `[B, Hq, n]`; a query that sees no row gives out 0 and lse -inf. Softmax in float32.
window_scores(query, key, starts, num_queries, scale) -> scores
    query `[B, Hq, w, D]` whose row i sits at column T - w + i; key `[B, Hkv, T, D]`; starts int32 `[B, Hkv]`, the
    first valid column;
    num_queries int32 `[B]`, how many of the w queries count (the last ones). Softmax over the columns starts .. T - w
    + i, read in float32,
    mean over those queries and over the query heads of each kv head: float32 `[B, Hkv, T]`, 0 before `starts`.
select_rows(scores, starts, counts, window, cu_kept, total) -> positions
    scores float32 `[R, C]`; of row r the counts[r] highest columns of starts[r] .. C - 1 (ties to the lower column) in
    column order,
    then the window columns max(starts[r], C) .. C + window - 1. cu_kept int32 `[R + 1]` and total (= cu_kept[R], known
    to the host)
    describe the lists; int32 `[total]`. Requires counts[r] <= max(0, C - starts[r]).

What a decoder layer does around its attention, each in one pass; every result is rounded to the dtype of the rows where
the modules of transformers round theirs. Rows of 64 bits are taken as those modules take them.

add_rms_norm(x, residual, weight, eps, unit_offset=False) -> (normed, sum)
    x and residual `[..., H]` contiguous, weight `[H]`, one dtype. sum = x + residual; normed = sum / sqrt(mean(sum²) +
    eps) in float32, rounded, times weight. `unit_offset`: times 1 + weight in float32, rounded once. Without residual
    sum is empty, `[0]`: it would be x.
rope_append(query, key, value, cos, sin, offsets, lens!, key_buffer!, value_buffer!, overflow!, mask=None,
            query_weight=None, key_weight=None, eps=0, unit_offset=False, interleaved=False) -> query
    query `[B, Hq, n, D]`, key, value `[B, Hkv, n, D]` (any strides, last dim contiguous); cos, sin `[B or 1, n, R]`, R
    even, up to D: the dimensions from R on are not rotated. The pairs are (d, d + R / 2) with the factors at both
    places, or, `interleaved`, (2d, 2d + 1) with those at d. With weights `[D]`, each row is first normalised as
    `add_rms_norm` does. Rotates query into a new `[B, Hq, n, D]`, and appends the rotated keys and the values as
    `append` does.
silu_mul(gate, up) -> product
gelu_tanh_mul(gate, up) -> product
    gate, up `[..., H]`, last dim contiguous: the activation of gate, rounded, times up.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "compact": "(Tensor key, Tensor value, Tensor positions, Tensor cu_kept, Tensor offsets, "
    "Tensor(a!) key_buffer, Tensor(b!) value_buffer) -> ()",
    "append": "(Tensor key, Tensor value, Tensor offsets, Tensor(a!) lens, Tensor(b!) key_buffer, "
    "Tensor(c!) value_buffer, Tensor(d!) overflow, Tensor? mask=None) -> ()",
    "varlen_decode": "(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor offsets, Tensor lens, "
    "float scale, Tensor? num_later=None) -> (Tensor, Tensor)",
    "window_scores": "(Tensor query, Tensor key, Tensor starts, Tensor num_queries, float scale) -> Tensor",
    "select_rows": "(Tensor scores, Tensor starts, Tensor counts, int window, Tensor cu_kept, int total) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor? residual, Tensor weight, float eps, bool unit_offset=False) "
    "-> (Tensor, Tensor)",
    "rope_append": "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor offsets, "
    "Tensor(a!) lens, Tensor(b!) key_buffer, Tensor(c!) value_buffer, Tensor(d!) overflow, Tensor? mask=None, "
    "Tensor? query_weight=None, Tensor? key_weight=None, float eps=0.0, bool unit_offset=False, "
    "bool interleaved=False) -> Tensor",
    "silu_mul": "(Tensor gate, Tensor up) -> Tensor",
    "gelu_tanh_mul": "(Tensor gate, Tensor up) -> Tensor",
}

LIBRARY = torch.library.Library("sparsemm", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


def _no_output(*args: object) -> None:
    """Fake of the operators that only write into buffers."""


def _varlen_decode_fake(query, key_buffer, value_buffer, offsets, lens, scale, num_later=None):
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.float32
    )


def _window_scores_fake(query, key, starts, num_queries, scale):
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _select_rows_fake(scores, starts, counts, window, cu_kept, total):
    return scores.new_empty((total,), dtype=torch.int32)


def _add_rms_norm_fake(x, residual, weight, eps, unit_offset=False):
    return torch.empty_like(x), torch.empty_like(x) if residual is not None else x.new_empty((0,))


def _like_first(first, *args, **kwargs):
    return torch.empty_like(first, memory_format=torch.contiguous_format)


for _name, _fake in {
    "compact": _no_output,
    "append": _no_output,
    "varlen_decode": _varlen_decode_fake,
    "window_scores": _window_scores_fake,
    "select_rows": _select_rows_fake,
    "add_rms_norm": _add_rms_norm_fake,
    "rope_append": _like_first,
    "silu_mul": _like_first,
    "gelu_tanh_mul": _like_first,
}.items():
    torch.library.register_fake(f"sparsemm::{_name}", _fake, lib=LIBRARY)

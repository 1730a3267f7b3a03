"""Ragged test cases and float64 references of the operators, written without looking at any implementation: plain
loops over row lists. Shared by the tests of the PyTorch twins, the C++ kernels, the emulated and the real CUDA
kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

POISON = 1e30  # what buffers hold before a test; finite in bfloat16 and float32, so a stray read spoils any result


def poison(dtype: torch.dtype) -> float:
    return 6e4 if dtype == torch.float16 else POISON


def ragged_layout(lens: list[int], slack: list[int] | int = 3, lead: int = 0) -> tuple[Tensor, Tensor, int]:
    """offsets int32 [R + 1], lens int32 [R], slots, with `slack` free slots behind each list and `lead` unused ones in
    front of the first."""
    slacks = [slack] * len(lens) if isinstance(slack, int) else slack
    offsets = [lead]
    for length, extra in zip(lens, slacks, strict=True):
        offsets.append(offsets[-1] + length + extra)
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), offsets[-1]


def skewed_lens(lists: int, mean: int, seed: int, share: float = 0.5, top: float = 0.05) -> list[int]:
    """Lengths as head scores make them: about `top` of the lists hold `share` of the rows, one is empty, one has a
    single row."""
    generator = torch.Generator().manual_seed(seed)
    heavy = max(1, round(top * lists))
    weights = torch.rand(lists, generator=generator) + 0.5
    order = torch.randperm(lists, generator=generator)
    weights[order[heavy:]] *= (1 - share) / weights[order[heavy:]].sum().clamp(min=1e-9)
    weights[order[:heavy]] *= share / weights[order[:heavy]].sum()
    lens = (weights * mean * lists).round().int().tolist()
    if lists > 2:
        lens[int(order[-1])], lens[int(order[-2])] = 0, 1
    return lens


@dataclasses.dataclass
class DecodeCase:
    """Arguments of one varlen_decode call, on the CPU."""

    query: Tensor
    key_buffer: Tensor
    value_buffer: Tensor
    offsets: Tensor
    lens: Tensor
    scale: float
    num_later: Tensor | None = None

    def arguments(self, device: str = "cpu") -> tuple:
        moved = (x.to(device) for x in (self.query, self.key_buffer, self.value_buffer, self.offsets, self.lens))
        return (*moved, self.scale, None if self.num_later is None else self.num_later.to(device))


def decode_case(
    lens: list[int],
    batch: int = 1,
    group: int = 1,
    n: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_later: Tensor | None = None,
    spread: float = 1.0,
) -> DecodeCase:
    """Random rows behind poisoned slack; `spread` scales the queries (large: one row takes nearly all the weight)."""
    generator = torch.Generator().manual_seed(seed)
    offsets, lengths, slots = ragged_layout(lens, slack=5, lead=2)
    num_kv_heads = len(lens) // batch
    query = (torch.randn(batch, num_kv_heads * group, n, head_dim, generator=generator) * spread).to(dtype)
    buffers = []
    for _ in range(2):
        buffer = torch.full((slots, head_dim), poison(dtype), dtype=dtype)
        for r, length in enumerate(lens):
            begin = int(offsets[r])
            buffer[begin : begin + length] = torch.randn(length, head_dim, generator=generator).to(dtype)
        buffers.append(buffer)
    return DecodeCase(query, *buffers, offsets, lengths, 1 / math.sqrt(head_dim), num_later)


def decode_reference(case: DecodeCase, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out, lse) computed in `dtype` from the case's own values, one query at a time."""
    batch, num_query_heads, n, head_dim = case.query.shape
    num_kv_heads = len(case.lens) // batch
    group = num_query_heads // num_kv_heads
    out = torch.zeros(batch, num_query_heads, n, head_dim, dtype=dtype)
    lse = torch.full((batch, num_query_heads, n), -math.inf, dtype=dtype)
    for b in range(batch):
        for head in range(num_query_heads):
            r = b * num_kv_heads + head // group
            for i in range(n):
                later = n - 1 - i if case.num_later is None else int(case.num_later[b, i])
                seen = min(max(0, int(case.lens[r]) - later), int(case.lens[r]))
                if seen == 0:
                    continue
                rows = slice(int(case.offsets[r]), int(case.offsets[r]) + seen)
                logits = case.key_buffer[rows].to(dtype) @ case.query[b, head, i].to(dtype) * case.scale
                out[b, head, i] = torch.softmax(logits, 0) @ case.value_buffer[rows].to(dtype)
                lse[b, head, i] = torch.logsumexp(logits, 0)
    return out, lse


def plain_error(case: DecodeCase, exact: Tensor) -> float:
    """Largest error of plain PyTorch attention in the dtype of the case: the yardstick of every kernel."""
    return float((decode_reference(case, case.query.dtype)[0].double() - exact).abs().max())


def check_decode(case: DecodeCase, out: Tensor, lse: Tensor) -> None:
    """Asserts the kernel tolerance: error at most twice that of plain PyTorch in the same dtype, but never less than
    one rounding of the result; in float32 four, times the size of the logits, whose roundings the softmax passes on.
    And the log-sum-exp is the exact one."""
    exact, exact_lse = decode_reference(case)
    floor = torch.finfo(case.query.dtype).eps * max(1.0, float(exact.abs().max()))
    if case.query.dtype == torch.float32:
        floor *= 4 * max(1.0, float(exact_lse.nan_to_num(neginf=0).abs().max()))
    error = float((out.double().cpu() - exact).abs().max())
    assert error <= max(2 * plain_error(case, exact), floor), f"error {error}, floor {floor}"
    empty = exact_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty), "queries without rows must have lse -inf"
    assert torch.all(out.cpu()[empty] == 0), "queries without rows must give zeros"
    torch.testing.assert_close(lse.cpu()[~empty].double(), exact_lse[~empty], rtol=2e-6, atol=1e-5)


def window_case(
    batch: int, num_kv_heads: int, group: int, window: int, columns: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Arguments of window_scores: starts from 0 to nearly the window, fewer counted queries in the last batch row."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, num_kv_heads * group, window, head_dim, generator=generator).to(dtype)
    key = torch.randn(batch, num_kv_heads, columns, head_dim, generator=generator).to(dtype)
    num_queries = torch.full((batch,), window, dtype=torch.int32)
    num_queries[-1] = max(1, window - 2)
    # Every counted query must see at least its own column.
    starts = torch.randint(0, max(1, columns - window), (batch, num_kv_heads), generator=generator).int()
    starts[0] = 0
    if columns == window:
        starts[-1] = window - int(num_queries[-1])
    return query, key, starts, num_queries, 1 / math.sqrt(head_dim)


def window_reference(query: Tensor, key: Tensor, starts: Tensor, num_queries: Tensor, scale: float) -> Tensor:
    """float64 [B, Hkv, T], one query at a time."""
    batch, num_query_heads, window, _ = query.shape
    num_kv_heads, columns = key.shape[1:3]
    group = num_query_heads // num_kv_heads
    scores = torch.zeros(batch, num_kv_heads, columns, dtype=torch.float64)
    for b in range(batch):
        for head in range(num_query_heads):
            h = head // group
            for i in range(window - int(num_queries[b]), window):
                visible = slice(int(starts[b, h]), columns - window + i + 1)
                logits = key[b, h, visible].double() @ query[b, head, i].double() * scale
                scores[b, h, visible] += torch.softmax(logits, 0) / (group * int(num_queries[b]))
    return scores


def select_case(
    lists: int, columns: int, window: int, seed: int, ties: bool = False
) -> tuple[Tensor, Tensor, Tensor, int, Tensor, int]:
    """Arguments of select_rows; counts from none to all; with `ties`, few different scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(lists, columns, generator=generator)
    if ties:
        scores = (scores * 4).floor() / 4
        scores[:, ::3] *= -1  # -0.0 and negative scores
    starts = torch.randint(0, columns + window // 2 + 1, (lists,), generator=generator).int()
    starts[0] = 0
    room = (columns - starts).clamp(min=0)
    counts = (torch.rand(lists, generator=generator) * (room + 1)).int().clamp(max=room)
    counts[-1] = room[-1]
    kept = counts + columns + window - starts.clamp(min=columns)
    cu_kept = torch.cat([torch.zeros(1, dtype=torch.int32), kept.cumsum(0).int()])
    return scores, starts, counts, window, cu_kept, int(cu_kept[-1])


def select_reference(
    scores: Tensor, starts: Tensor, counts: Tensor, window: int, cu_kept: Tensor, total: int
) -> Tensor:
    chosen: list[int] = []
    columns = scores.shape[1]
    for r in range(scores.shape[0]):
        start = int(starts[r])
        ranked = sorted(range(start, columns), key=lambda c: (-float(scores[r, c]), c))  # noqa: B023
        chosen += sorted(ranked[: int(counts[r])]) + list(range(max(start, columns), columns + window))
    assert len(chosen) == total
    return torch.tensor(chosen, dtype=torch.int32)


@dataclasses.dataclass
class CompactCase:
    """Arguments of compact and the buffers it must produce."""

    key: Tensor
    value: Tensor
    positions: Tensor
    cu_kept: Tensor
    offsets: Tensor
    slots: int
    expected_key: Tensor
    expected_value: Tensor

    def run(self, compact, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Calls `compact` on poisoned buffers and returns them."""
        fill = poison(self.key.dtype)
        buffers = [
            torch.full((self.slots, self.key.shape[-1]), fill, dtype=self.key.dtype, device=device) for _ in range(2)
        ]
        # Strides survive the move to a device only if the storage moves as it is.
        key, value = (x if device == "cpu" else x.transpose(1, 2).contiguous().to(device).transpose(1, 2) for x in
                      (self.key, self.value))  # fmt: skip
        compact(key, value, *(x.to(device) for x in (self.positions, self.cu_kept, self.offsets)), *buffers)
        return buffers[0].cpu(), buffers[1].cpu()

    def check(self, key_buffer: Tensor, value_buffer: Tensor) -> None:
        assert torch.equal(key_buffer, self.expected_key), "keys are not copied bit for bit"
        assert torch.equal(value_buffer, self.expected_value), "values are not copied bit for bit"


def compact_case(
    kept: list[int], batch: int, columns: int, head_dim: int, dtype: torch.dtype, seed: int, strided: bool = True
) -> CompactCase:
    """`kept[r]` random columns of each row list; `strided`: heads behind columns in memory, as projections leave
    them."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = len(kept) // batch
    sources = []
    for _ in range(2):
        if strided:
            rows = torch.randn(batch, columns, num_kv_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        else:
            rows = torch.randn(batch, num_kv_heads, columns, head_dim, generator=generator).to(dtype)
        sources.append(rows)
    lists = [torch.randperm(columns, generator=generator)[:count].sort().values.int() for count in kept]
    cu_kept = torch.tensor([0, *kept]).cumsum(0).int()
    offsets, _, slots = ragged_layout(kept, slack=2, lead=1)
    expected = [torch.full((slots, head_dim), poison(dtype), dtype=dtype) for _ in range(2)]
    for r, columns_kept in enumerate(lists):
        for i, column in enumerate(columns_kept.tolist()):
            for source, target in zip(sources, expected, strict=True):
                target[int(offsets[r]) + i] = source[r // num_kv_heads, r % num_kv_heads, column]
    positions = torch.cat(lists) if lists else torch.empty(0, dtype=torch.int32)
    return CompactCase(*sources, positions, cu_kept, offsets, slots, *expected)


def opcheck_arguments():
    """Arguments of every operator, small."""
    decode = decode_case([5, 9], group=2, n=2, head_dim=32)
    compact = compact_case([3, 1], 1, 6, 32, torch.float32, seed=0)
    buffers = [torch.zeros(compact.slots, 32), torch.zeros(compact.slots, 32)]
    rows = torch.randn(1, 2, 1, 32)
    return {
        "compact": (compact.key, compact.value, compact.positions, compact.cu_kept, compact.offsets, *buffers),
        "append": (rows, rows.clone(), decode.offsets, decode.lens, decode.key_buffer, decode.value_buffer,
                   torch.zeros(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool)),
        "varlen_decode": decode.arguments(),
        "window_scores": window_case(1, 2, 2, 4, 10, 32, torch.float32, seed=0),
        "select_rows": select_case(2, 12, 3, seed=0),
    }  # fmt: skip


def check_decode_of_ended(decode: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Sequences that see nothing: with lists shared by blocks, and with a block for each."""
    later = torch.tensor([[0], [torch.iinfo(torch.int32).max]], dtype=torch.int32)
    for lens in ([300, 0, 290, 5], [20, 3, 0, 30]):
        case = decode_case(lens, batch=2, group=2, head_dim=32, dtype=torch.bfloat16, num_later=later)
        check_decode(case, *decode(*case.arguments()))


def check_last_rounding(decode: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Most values of 16-bit rows are those of exact arithmetic, rounded once."""
    case = decode_case([400, 400], group=4, head_dim=64, dtype=torch.bfloat16)
    out, _ = decode(*case.arguments())
    assert float((out == decode_reference(case)[0].bfloat16()).double().mean()) > 0.99


def check_append(
    append: Callable[..., None], dtype: torch.dtype, head_dim: int, n: int, masked: bool, device: str = "cpu"
) -> None:
    """n rows appended to lists with room for them, and to one without, of which the flag tells."""
    generator = torch.Generator().manual_seed(n + head_dim)
    batch, heads = 2, 3
    offsets, lens, slots = ragged_layout([4, 0, 9, 1, 2, 0], slack=[n, n + 1, n - 1, 7, n, 0], lead=1)
    slots += n  # rows behind the last list, which nothing may write
    key = torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    value = torch.randn(batch, heads, n, head_dim, generator=generator).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, n, generator=generator) < 0.7
        mask[0] = True  # so that a list is too full for them
    buffers = [torch.full((slots, head_dim), poison(dtype), dtype=dtype) for _ in range(2)]
    expected, expected_lens = [b.clone() for b in buffers], lens.clone()
    for r in range(batch * heads):
        stored = [i for i in range(n) if mask is None or mask[r // heads, i]]
        if int(lens[r]) + len(stored) > int(offsets[r + 1] - offsets[r]):
            continue
        first = int(offsets[r] + lens[r])
        for source, target in zip((key, value), expected, strict=True):
            target[first : first + len(stored)] = source[r // heads, r % heads, stored]
        expected_lens[r] += len(stored)
    overflow = torch.zeros(1, dtype=torch.int32)
    key, value, offsets, lens, overflow = (each.to(device) for each in (key, value, offsets, lens, overflow))
    buffers = [each.to(device) for each in buffers]
    append(key, value, offsets, lens, *buffers, overflow, None if mask is None else mask.to(device))
    assert torch.equal(lens.cpu(), expected_lens)
    assert int(overflow) == 1
    assert torch.equal(buffers[0].cpu(), expected[0]) and torch.equal(buffers[1].cpu(), expected[1])

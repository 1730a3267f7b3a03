"""Cases of the operators around attention; the references are the modules and functions of transformers themselves."""

from __future__ import annotations

from collections.abc import Callable

import ragged_cases
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

ACTIVATIONS = {"silu_mul": "silu", "gelu_tanh_mul": "gelu_pytorch_tanh"}


def assert_rounded_alike(found: Tensor, expected: Tensor, share: float = 0.02) -> None:
    """Equal but for float32's last bits; of 16 bits, few may have been rounded to the neighbour."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype in (torch.float32, torch.float64):  # norms are computed in float32 either way
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5 if found.dtype == torch.float32 else 3e-6)
        return
    neighbour = 2.1 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=neighbour, atol=neighbour * 0.1)
    off = int((found != expected).sum())
    assert off <= max(2, share * found.numel()), f"{off} of {found.numel()} values are rounded otherwise"


def norm_of_transformers(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    module = (GemmaRMSNorm if unit_offset else LlamaRMSNorm)(weight.shape[0], eps)
    module.weight.data = weight
    with torch.no_grad():
        return module(x)


def random(*size: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_add_rms_norm(
    operator: Callable, dtype: torch.dtype, rows: int, size: int, unit_offset: bool, device: str = "cpu"
) -> None:
    """With and without a residual; a row of zeros among them."""
    x, residual = (random(rows, 1, size, dtype=dtype, seed=seed, scale=3.0) for seed in (size, size + 1))
    x[0], residual[0] = 0, 0
    weight = random(size, dtype=dtype, seed=2)
    for other in (residual, None):
        moved = [None if each is None else each.to(device) for each in (x, other, weight)]
        normed, total = operator(*moved, 1e-5, unit_offset)
        if other is None:
            assert total.shape == (0,)
        else:
            assert torch.equal(total.cpu(), x + other)
        expected = norm_of_transformers(x if other is None else x + other, weight, 1e-5, unit_offset)
        assert_rounded_alike(normed.cpu(), expected)


def check_gated(operator: Callable, name: str, dtype: torch.dtype, rows: int, size: int, device: str = "cpu") -> None:
    """Large arguments included; gate and up as halves of one product, and apart."""
    both = random(rows, 1, 2 * size, dtype=dtype, seed=size, scale=6.0)
    both[0, 0, 0], both[0, 0, 1] = 120.0, -120.0
    expected = ACT2FN[ACTIVATIONS[name]](both[..., :size].contiguous()) * both[..., size:]
    both = both.to(device)
    share = 0.02 if name == "silu_mul" else 0.2  # 1 + tanh, as PyTorch computes it, loses digits below zero
    for gate, up in ((both[..., :size], both[..., size:]), (both[..., :size].contiguous(), both[..., size:].clone())):
        assert_rounded_alike(operator(gate, up).cpu(), expected, share)


def check_rope_append(
    operator: Callable,
    dtype: torch.dtype,
    head_dim: int,
    *,
    n: int = 1,
    width: int | None = None,
    interleaved: bool = False,
    masked: bool = False,
    normed: str | None = None,
    shared_positions: bool = False,
    device: str = "cpu",
) -> None:
    """Two sequences of six query and three kv heads, one list of them full; `normed`: "llama" or "gemma"."""
    batch, heads, group, width = 2, 3, 2, width or head_dim
    offsets, lens, slots = ragged_cases.ragged_layout([4, 0, 9, 1, 2, 0], slack=[n, n + 1, n - 1, 7, n, 0], lead=1)
    slots += n  # rows behind the last list, which nothing may write
    query = random(batch, n, heads * group, head_dim, dtype=dtype, seed=1).transpose(1, 2)
    key = random(batch, n, heads, head_dim, dtype=dtype, seed=2).transpose(1, 2)
    value = random(batch, heads, n, head_dim, dtype=dtype, seed=3)
    angles = random(1 if shared_positions else batch, n, width // 2, dtype=torch.float32, seed=4, scale=3.0)
    cos, sin = (torch.cat([each, each], -1).to(dtype) for each in (angles.cos(), angles.sin()))
    mask = None
    if masked:
        mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(5)) < 0.6
        mask[0, 0] = False
    weights = (None, None)
    if normed is not None:
        weights = tuple(random(head_dim, dtype=dtype, seed=seed) for seed in (6, 7))
    unit_offset, rotate = normed == "gemma", rotate_interleaved if interleaved else rotate_halves

    plain = [query, key]
    if normed is not None:
        plain = [
            norm_of_transformers(each, weight, 1e-6, unit_offset) for each, weight in zip(plain, weights, strict=True)
        ]
    turned = rotate(*(each[..., :width] for each in plain), cos, sin)
    expected_query, new_key = (
        torch.cat([each, rest[..., width:]], -1) for each, rest in zip(turned, plain, strict=True)
    )
    buffers = [torch.full((slots, head_dim), ragged_cases.poison(dtype), dtype=dtype) for _ in range(2)]
    expected, expected_lens, full, written = [b.clone() for b in buffers], lens.clone(), 0, []
    for r in range(batch * heads):
        stored = [i for i in range(n) if mask is None or mask[r // heads, i]]
        if int(lens[r]) + len(stored) > int(offsets[r + 1] - offsets[r]):
            full = 1
            continue
        first = int(offsets[r] + lens[r])
        written += range(first, first + len(stored))
        for source, target in zip((new_key, value), expected, strict=True):
            target[first : first + len(stored)] = source[r // heads, r % heads, stored]
        expected_lens[r] += len(stored)
    assert full, "the case must contain a full list"

    move = lambda each: None if each is None else each.to(device)  # noqa: E731
    overflow, lens_there = torch.zeros(1, dtype=torch.int32, device=device), lens.to(device, copy=True)
    targets = [each.to(device, copy=True) for each in buffers]
    found = operator(
        *map(move, (query, key, value, cos, sin, offsets)), lens_there, *targets, overflow, move(mask),
        *map(move, weights), 1e-6, unit_offset, interleaved,
    )  # fmt: skip
    assert torch.equal(lens_there.cpu(), expected_lens) and int(overflow) == full
    assert found.is_contiguous()
    assert_rounded_alike(found.cpu(), expected_query)
    key_buffer, value_buffer = (each.cpu() for each in targets)
    assert torch.equal(value_buffer, expected[1])
    untouched = [slot for slot in range(slots) if slot not in written]
    assert torch.equal(key_buffer[untouched], expected[0][untouched])
    assert_rounded_alike(key_buffer[written], expected[0][written])


ROPE_CASES = [
    dict(head_dim=16),
    dict(head_dim=64, n=3, masked=True),
    dict(head_dim=72, width=40, n=2),
    dict(head_dim=128, normed="llama", shared_positions=True),
    dict(head_dim=80, normed="gemma", n=5, masked=True),
    dict(head_dim=64, width=32, interleaved=True, n=2),
    dict(head_dim=256, interleaved=True, normed="llama"),
]


def opcheck_arguments() -> dict[str, tuple]:
    """Arguments of every operator, small."""
    row, weight = torch.randn(2, 1, 32), torch.randn(32)
    query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    cos, sin = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    offsets, lens, slots = ragged_cases.ragged_layout([3, 2], slack=2)
    buffers, overflow = [torch.zeros(slots, 32), torch.zeros(slots, 32)], torch.zeros(1, dtype=torch.int32)
    rope = (query, key, key.clone(), cos, sin, offsets, lens, *buffers, overflow)
    return {
        "add_rms_norm": (row, row.clone(), weight, 1e-6),
        "rope_append": (*rope, torch.ones(1, 1, dtype=torch.bool), weight, weight.clone(), 1e-6),
        "silu_mul": (row, row.clone()),
        "gelu_tanh_mul": (row, row.clone()),
    }

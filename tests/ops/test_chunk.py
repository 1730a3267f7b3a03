"""Dense attention inside a chunk, and its union with attention over other rows, against one plain softmax."""

from __future__ import annotations

import pytest
import torch

from sparsemm.ops import chunk as ops


def plain(query, key, value, scale, mask=None, before=0, own=True):
    """Attention of the chunk's queries over `before` rows and (`own`) the chunk up to each: float64 out, lse."""
    batch, heads, n, _ = query.shape
    group = heads // key.shape[1]
    out, lse = torch.zeros(*query.shape, dtype=torch.float64), torch.full((batch, heads, n), -torch.inf)
    for b in range(batch):
        for head in range(heads):
            for i in range(n):
                inside = [before + t for t in range(i + 1) if mask is None or mask[b, t]] if own else []
                seen = [*range(before), *inside]
                if seen:
                    logits = key[b, head // group, seen].double() @ query[b, head, i].double() * scale
                    lse[b, head, i] = logits.logsumexp(0)
                    out[b, head, i] = logits.softmax(0) @ value[b, head // group, seen].double()
    return out, lse


def states(n, heads=4, kv_heads=2, dim=8, before=0):
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(2, heads, n, dim, generator=generator)
    return query, *(torch.randn(2, kv_heads, before + n, dim, generator=generator) for _ in range(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 5, 12])
def test_causal_attention(n, masked, monkeypatch):
    monkeypatch.setattr(ops, "_QUERY_TILE", 4)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if masked:
        mask[0, 0] = False  # the first query of the first row sees nothing
    query, key, value = states(n)
    out, lse = ops.causal_attention(query, key, value, 0.3, mask)
    expected, expected_lse = plain(query, key, value, 0.3, mask)
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())
    assert out.dtype == query.dtype and (not masked or bool((out[0, :, 0] == 0).all()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_halves_are_the_whole(dtype):
    n, before = 6, 7
    query, key, value = (each.to(dtype) for each in states(n, before=before))
    inside = ops.causal_attention(query, key[:, :, before:], value[:, :, before:], 0.3)
    others = plain(query, key[:, :, :before], value[:, :, :before], 0.3, before=before, own=False)
    merged = ops.merge_attention((others[0].to(dtype), others[1].float()), inside)
    expected, _ = plain(query, key, value, 0.3, before=before)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    nothing = torch.zeros_like(inside[0]), torch.full_like(inside[1], -torch.inf)
    assert torch.equal(ops.merge_attention(nothing, inside), inside[0])
    assert not bool(ops.merge_attention(nothing, nothing).any())

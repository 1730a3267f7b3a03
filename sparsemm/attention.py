"""The one attention forward of all supported models.

What it needs of an attention module is in its `Projections`, which patching proves. Prefill is transformers' own
attention (SDPA, flash-attn, eager); everything after the first chunk of a sequence reads the ragged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.cache import SparseCache, SparseLayer
from sparsemm.models.projections import Projections

Observer = Callable[[int, Tensor, SparseLayer], None]
"""`observer(layer_idx, query, layer)` after every attention forward: the layer's index among those with ragged rows,
query `[B, Hq, n, D]` after RoPE, rows stored. Under tensor parallelism of this process's heads: what belongs to all is
brought together by `layer.plan.parallel.gather`."""


def sparse_attention(
    module: nn.Module,
    projections: Projections,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: SparseCache | None = None,
    *,
    head_mask: Tensor | None = None,
    mask_mode: str = "zero_query",
    observer: Observer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand-in for `module.forward`.

    Args:
        module: A self-attention module.
        projections: Its own.
        hidden_states: `[batch, columns, hidden_size]`.
        position_embeddings: cos and sin of the columns, as the decoder layer hands them over.
        attention_mask: As transformers prepares it for prefill; not read afterwards.
        past_key_values: The cache whose `begin_chunk` announced these columns, or None (`use_cache=False`).
        head_mask: `[num_query_heads]` in the dtype of the model, 0 for masked heads, or None (spec section 6).
        mask_mode: `zero_query` or `zero_output`.

    Returns:
        Output `[batch, columns, hidden_size]`, and the prefill's attention weights where its implementation has them.
    """
    layer = None if past_key_values is None else past_key_values.layers[module.layer_idx]
    chunk, scaling = None if layer is None else past_key_values.chunk, projections.scaling
    # One operator rotates and appends a decoded token. It has no gradient.
    fused = projections.interleaved is not None and not torch.is_grad_enabled()
    fused = fused and layer is not None and layer.seen > 0 and chunk.columns == 1
    if fused:
        query, key, value = projections.before_rotation(module, hidden_states)
        turn = (None, None, 0.0, False, projections.interleaved)
        query = layer.append_rotated(query, key, value, *position_embeddings, rotation=turn, chunk=chunk)
    else:
        query, key, value = projections.project(module, hidden_states, position_embeddings)
    if head_mask is not None and mask_mode == "zero_query":
        query = query * head_mask[:, None, None]

    rotation = {} if layer is None else _rotation(projections, query, position_embeddings, past_key_values)
    weights = None
    if fused:
        out = layer.decode(query, scaling, None)[0].transpose(1, 2)
    elif layer is None or layer.seen == 0:
        out, weights = projections.attend(module, query, key, value, attention_mask, **kwargs)
        if layer is not None:
            layer.store_prompt(query, key, value, chunk, scaling, **rotation)
    else:
        out = layer.attend(query, key, value, chunk, scaling, **rotation).transpose(1, 2)
    if observer is not None and layer is not None:
        observer(layer.layer_idx, query, layer)
    del query, key, value, rotation  # a long prompt's are as large as the largest activations that follow
    if head_mask is not None and mask_mode == "zero_output":
        out = out * head_mask[:, None]
    return projections.output(module, out), weights


def _rotation(
    projections: Projections, query: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, cache: SparseCache
) -> dict[str, Tensor]:
    """What methods are told that look ahead (`PromptStates`), of a chunk that is chosen among."""
    if cache.chunk.prompt_lengths is None or "ahead" not in cache.plan.method.sees:
        return {}
    unrotated = projections.turned_back(query, position_embeddings)
    return {"unrotated": unrotated, "ahead": projections.matrix(cache.chunk.ahead, like=query)}


def head_mask_for(masked: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Factor per query head from a layer's bool `[num_query_heads]` (True = masked); None when no head is masked."""
    return (~masked).to(device=device, dtype=dtype) if bool(masked.any()) else None

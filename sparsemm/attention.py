"""The one attention forward of all supported families: Llama, Mistral and Qwen2-VL.

Their attention modules share names (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim`, `scaling`) and differ in biases
and rotary embedding only. Prefill is transformers' own attention (SDPA, flash-attn, eager); everything after the first
chunk of a sequence reads the ragged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2_vl import modeling_qwen2_vl

from sparsemm.cache import SparseCache, SparseLayer

ROTARY: dict[type[nn.Module], Callable[..., tuple[Tensor, Tensor]]] = {
    modeling_llama.LlamaAttention: modeling_llama.apply_rotary_pos_emb,
    modeling_mistral.MistralAttention: modeling_mistral.apply_rotary_pos_emb,
    modeling_qwen2_vl.Qwen2VLAttention: modeling_qwen2_vl.apply_rotary_pos_emb,
}
"""Attention classes that `sparse_attention` can stand in for, with their rotary embedding."""

ROTARY_TILE = 2048
"""Columns of a prompt that are rotated at a time."""

Observer = Callable[[int, Tensor, SparseLayer], None]
"""`observer(layer_idx, query, layer)` after every attention forward: query `[B, Hq, n, D]` after RoPE, rows stored."""


def sparse_attention(
    module: nn.Module,
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
        module: A self-attention module of `ROTARY`.
        hidden_states: `[batch, columns, hidden_size]`.
        position_embeddings: cos and sin of the columns, as the decoder layer hands them over.
        attention_mask: As transformers prepares it for prefill; not read afterwards.
        past_key_values: The cache whose `begin_chunk` announced these columns, or None (`use_cache=False`).
        head_mask: `[num_query_heads]` in the dtype of the model, 0 for masked heads, or None (spec section 6).
        mask_mode: `zero_query` or `zero_output`.

    Returns:
        Output `[batch, columns, hidden_size]`, and the prefill's attention weights where its implementation has them.
    """
    batch, columns = hidden_states.shape[:2]
    heads = (batch, columns, -1, module.head_dim)
    query = module.q_proj(hidden_states).view(heads).transpose(1, 2)
    key = module.k_proj(hidden_states).view(heads).transpose(1, 2)
    value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
    query, key = _rotate(ROTARY[type(module)], query, key, *position_embeddings)
    if head_mask is not None and mask_mode == "zero_query":
        query = query * head_mask[:, None, None]

    layer = None if past_key_values is None else past_key_values.layers[module.layer_idx]
    weights = None
    if layer is None or layer.get_seq_length() == 0:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, weights = attend(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **kwargs,
        )
        if layer is not None:
            layer.store_prompt(query, key, value, past_key_values.chunk, module.scaling)
    else:
        out = layer.attend(query, key, value, past_key_values.chunk, module.scaling).transpose(1, 2)
    if observer is not None and layer is not None:
        observer(module.layer_idx, query, layer)
    del query, key, value  # a long prompt's are as large as the largest activations that follow
    if head_mask is not None and mask_mode == "zero_output":
        out = out * head_mask[:, None]
    return module.o_proj(out.reshape(batch, columns, -1)), weights


def _rotate(
    rotary: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of query and key `[batch, heads, columns, head_dim]`; a long prompt's in place, in tiles.

    All at once it would hold several more tensors of their size. The values are the same.
    """
    if query.shape[2] <= ROTARY_TILE or torch.is_grad_enabled():
        return rotary(query, key, cos, sin)
    for begin in range(0, query.shape[2], ROTARY_TILE):
        tile = slice(begin, begin + ROTARY_TILE)
        query[:, :, tile], key[:, :, tile] = rotary(
            query[:, :, tile], key[:, :, tile], cos[..., tile, :], sin[..., tile, :]
        )
    return query, key


def head_mask_for(masked: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Factor per query head from a layer's bool `[num_query_heads]` (True = masked); None when no head is masked."""
    return (~masked).to(device=device, dtype=dtype) if bool(masked.any()) else None

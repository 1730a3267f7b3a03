"""What an attention module does before and after its attention, read off the module; `proof` shows that it is so.

The modules of transformers share names: `q_proj`, `k_proj`, `v_proj` (or one `qkv_proj`), `o_proj`, `head_dim`,
`scaling`, where they have them `q_norm` and `k_norm`; the rotary function, the eager attention and the interface to
the other attention functions stand in the module's own source file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.errors import UnsupportedModelError

ROTARY_TILE = 2048
"""Columns of a prompt whose queries and keys are normalised and rotated at a time."""

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`rotary(query, key, cos, sin)`, both `[batch, heads, columns, head_dim]`."""


@dataclass(frozen=True)
class Projections:
    """How one attention module makes query, key and value, and its output. Holds nothing of the module itself.

    Attributes:
        head_dim: Size of a query, key or value row.
        fused: Widths of query, key and value in the output of one `qkv_proj`; None where they have their own.
        norms: Whether `q_norm` and `k_norm` take one head at a time ("head"), all of them ("width"), or are not there.
        rotary: The rotary function of the module's source file, or None for a layer without rotary embedding.
        interleaved: Whether neighbours are rotated together, or halves; None where `rope_append` cannot.
        interface: The attention functions that the source file chooses from.
        eager: Its own attention function, for `attn_implementation="eager"`.
        scaling: Factor of the attention logits.
        num_kv_heads: kv heads that this process has: the layer's, or its part of them under tensor parallelism.
    """

    head_dim: int
    fused: tuple[int, int, int] | None
    norms: str | None
    rotary: Rotary | None
    interface: Any
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    scaling: float
    num_kv_heads: int
    interleaved: bool | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Projections:
        """Read them off `module`. Raises `UnsupportedModelError` where it is built otherwise."""
        fused, source = _fused(module), _source_of(module)
        head_dim = getattr(module, "head_dim", None)
        if source is None or head_dim is None:
            raise UnsupportedModelError("it does not attend through transformers' attention interface")
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError("it attends in both directions")
        scaling = getattr(module, "scaling", None)
        return cls(
            head_dim=head_dim,
            fused=fused,
            norms=_norms(module, head_dim),
            rotary=source.get("apply_rotary_pos_emb"),
            interface=source["ALL_ATTENTION_FUNCTIONS"],
            eager=source["eager_attention_forward"],
            scaling=head_dim**-0.5 if scaling is None else scaling,
            num_kv_heads=module.config.num_key_value_heads,
        )

    def project(
        self, module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[batch, query heads, columns, head_dim]`, key and value `[batch, kv heads, columns, head_dim]`.

        Norms and rotation of a long prompt work in place and in tiles: all at once they would hold several more tensors
        of its size. The values are the same.
        """
        query, key, value = self._apart(module, hidden_states)
        columns, value = hidden_states.shape[1], value.transpose(1, 2)
        if self.norms is None and self.rotary is None:
            return query.transpose(1, 2), key.transpose(1, 2), value
        tile = columns if torch.is_grad_enabled() else ROTARY_TILE
        for begin in range(0, columns, tile):
            part = slice(begin, begin + tile)
            new_query, new_key = self._finish(module, query[:, part], key[:, part], position_embeddings, part)
            if columns <= tile:
                return new_query, new_key, value
            query[:, part], key[:, part] = new_query.transpose(1, 2), new_key.transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if key.device.type == "cpu" and key.dtype == torch.float32:  # attention takes a tenth less time there
            key = key.contiguous()  # the one is freed before the other is copied
            value = value.contiguous()
        return query, key, value

    def before_rotation(self, module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` gives, but not rotated yet."""
        query, key, value = self._apart(module, hidden_states)
        query, key = self._normed(module, query, key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _apart(self, module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[batch, columns, heads, head_dim]` as the projections give them."""
        if self.fused is None:
            parts = module.q_proj(hidden_states), module.k_proj(hidden_states), module.v_proj(hidden_states)
        else:
            parts = module.qkv_proj(hidden_states).split(self.fused, dim=-1)
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = parts
        return query.view(shape), key.view(shape), value.view(shape)

    def _normed(self, module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, columns, heads, head_dim]`, normalised."""
        if self.norms == "head":
            return module.q_norm(query), module.k_norm(key)
        if self.norms == "width":
            return module.q_norm(query.flatten(2)).view(query.shape), module.k_norm(key.flatten(2)).view(key.shape)
        return query, key

    def _finish(
        self, module: nn.Module, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor], part: slice
    ) -> tuple[Tensor, Tensor]:
        """`[batch, columns, heads, head_dim]` of some columns -> normalised, rotated, heads before columns."""
        query, key = (states.transpose(1, 2) for states in self._normed(module, query, key))
        if self.rotary is None:
            return query, key
        cos, sin = position_embeddings
        return self.rotary(query, key, cos[..., part, :], sin[..., part, :])

    def turned_back(self, query: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """The query `[batch, heads, columns, head_dim]` that these cos and sin have rotated, before that: float32."""
        query = query.float()
        if self.rotary is None:
            return query
        cos, sin = (each.float() for each in position_embeddings)
        size = cos.square() + sin.square()  # not 1 where the rotation also scales, and where cos and sin are rounded
        return self.rotary(query, query[:, :1], cos / size, -sin / size)[0]

    def matrix(self, position_embeddings: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor:
        """What cos and sin `[..., batch or 1, 1, size]` make of a row: float32 `[batch or 1, head_dim, head_dim]`, on
        the device of `like`."""
        unit = torch.eye(self.head_dim, device=like.device)[None, None]
        if self.rotary is None:
            return unit[0]
        cos, sin = (
            each.to(like.device).float().expand(*each.shape[:-2], self.head_dim, -1) for each in position_embeddings
        )
        unit = unit.expand(cos.shape[-3], -1, -1, -1)
        return self.rotary(unit, unit, cos, sin)[0][:, 0].transpose(1, 2)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention of the model's setting: `[batch, columns, query heads, head_dim]`, and its weights
        where the implementation has them."""
        attend = self.interface.get_interface(module.config._attn_implementation, self.eager)
        dropout = module.attention_dropout if module.training else 0.0
        return attend(module, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def output(self, module: nn.Module, out: Tensor) -> Tensor:
        """`[batch, columns, query heads, head_dim]` to `[batch, columns, hidden_size]`."""
        return module.o_proj(out.reshape(*out.shape[:2], -1).contiguous())


def _source_of(module: nn.Module) -> Mapping[str, Any] | None:
    """The names of the source file that the module's attention comes from: its class's, or a base class's."""
    for base in type(module).__mro__:
        names = vars(sys.modules[base.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names and "eager_attention_forward" in names:
            return names
    return None


def _fused(module: nn.Module) -> tuple[int, int, int] | None:
    """Widths of query, key and value where one projection makes them. Raises `UnsupportedModelError` without any."""
    parts = {name for name, part in module.named_children() if part is not None}
    if getattr(module, "is_kv_shared_layer", False):
        raise UnsupportedModelError("it takes keys and values from another layer (shared KV)")
    if any(name.startswith(("kv_a_", "kv_b_")) for name in parts):
        raise UnsupportedModelError("it makes keys and values from a compressed latent (multi-head latent attention)")
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts:
        return None
    if {"qkv_proj", "o_proj"} <= parts:
        heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
        return heads * module.head_dim, kv_heads * module.head_dim, kv_heads * module.head_dim
    raise UnsupportedModelError(
        f"it has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj; its parts are {', '.join(sorted(parts))}"
    )


def _norms(module: nn.Module, head_dim: int) -> str | None:
    if getattr(module, "q_norm", None) is None:
        return None
    weight = getattr(module.q_norm, "weight", None)
    return "head" if weight is None or weight.shape[-1] == head_dim else "width"

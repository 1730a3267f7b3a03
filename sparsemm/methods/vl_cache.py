"""VL-Cache: layers get rows by how dense the attention of the text behind the image is, positions by its sum."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import LongTensor, Tensor

from sparsemm.methods.budgets import fill_in_proportion, largest_fraction, whole_shares
from sparsemm.methods.method import BudgetRequest, Method, PromptStates, Settings

THRESHOLD = 0.01
"""A weight below this share of its row's largest counts as zero: p = 1 % of the paper's equation 1."""
_TILE = 64
"""Queries whose attention is held at a time."""


def attention_behind_the_image(settings: Settings, states: PromptStates) -> tuple[Tensor, Tensor]:
    """Scores of the columns before the window, and the density of the layer's attention, in float32 (Tu et al.,
    "VL-Cache", ICLR 2025, arXiv 2410.23317).

    The queries are those of the tokens behind the last image token, of all tokens where there is no image. A column's
    score is the sum of their attention weights (the paper's section 3.2), the mean over the query heads of a kv head,
    of which the paper says nothing. The density, 1 minus the sparsity of equation 2 over these queries, is the share of
    their causal weights that reach 1 % of the largest of their row.

    The first of these tokens is asked of the device, once a layer.
    """
    key = states.key.float()
    (batch, num_kv_heads, seq_len, head_dim), columns = key.shape, states.query.shape[2]
    place = torch.arange(columns, device=key.device)
    last_image = torch.where(states.image, place, -1).amax(1, keepdim=True).clamp(max=columns - 2)
    counted = (place > last_image) & (place >= columns - states.num_queries[:, None])
    scores = key.new_zeros(batch, num_kv_heads, seq_len)
    reached, entries = key.new_zeros(2, batch, num_kv_heads, dtype=torch.float64)
    column = torch.arange(seq_len, device=key.device)
    for begin in range(int(counted.any(0).int().argmax()), columns, _TILE):
        part = slice(begin, begin + _TILE)
        query = states.query[:, :, part].float()
        query = query.reshape(batch, num_kv_heads, -1, query.shape[2], head_dim)
        causal = column <= (seq_len - columns + place[part])[:, None]
        seen = causal & states.valid[:, :, None] & counted[:, None, part, None]
        logits = torch.einsum("bhgqd,bhtd->bhgqt", query, key) * states.scaling
        weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        scores += weights.mean(2).sum(2)
        least = THRESHOLD * weights.amax(-1, keepdim=True)
        reached += ((weights >= least) & seen[:, :, None]).double().mean(2).sum((2, 3))
        entries += seen.sum((2, 3))
    return scores[..., : states.columns], reached / entries.clamp(min=1)


def budgets_by_density(request: BudgetRequest, said: Tensor) -> LongTensor:
    """Rows beyond the window in proportion to the layers' densities (the mean over their heads), all heads of a layer
    alike: int64 `[num_layers, num_kv_heads]` (Algorithm 1 of the paper).

    Algorithm 1 gives every layer at least 1 % of the prompt and caps it at the whole, and loses what does not fit; its
    window of recent tokens is 10 % of a layer's rows (section 5). Here the window is the least, the same for every
    layer, and what a full layer cannot take goes to the others, so that sums are exact.
    """
    budget, window, length = request.settings.budget, request.settings.window_size, request.prompt_length
    shares = whole_shares([[density] for density in said.mean(1).nan_to_num(0.0).tolist()])
    total = Fraction(request.num_layers * (budget - window))
    extra, unit = fill_in_proportion(shares, total=total, limit=Fraction(length - window))
    rows = largest_fraction([window * unit + part for part in extra], unit, total=request.num_layers * budget)
    return torch.tensor(rows).unsqueeze(1).repeat(1, request.num_kv_heads)


VL_CACHE = Method(
    name="vl_cache",
    prompt_budgets=budgets_by_density,
    score_layer=attention_behind_the_image,
    sees=("image",),
    paper_rounding=False,
)

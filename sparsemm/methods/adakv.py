"""AdaKV: inside each layer, heads whose attention is spread out get rows from those whose attention is concentrated."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.methods.budgets import decimal_fraction, largest_fraction_on_device
from sparsemm.methods.method import Method, Settings


def adaptive_budgets(settings: Settings, scores: Tensor, valid: Tensor) -> Tensor:
    """Spec section 3, row `adakv`: int64 `[batch, num_kv_heads]` rows kept beyond the window.

    Args:
        settings: Its budget, window_size, adakv_floor and rounding are read.
        scores: float32 `[batch, num_kv_heads, columns]`, pooled scores of the columns before the window.
        valid: bool, same shape; False for columns that hold no row.

    Nothing is read back to the host. Under `exact` the rows of a layer sum to `num_kv_heads * (budget - window_size)`
    wherever that many columns are valid.
    """
    num_kv_heads, columns = scores.shape[1:]
    base = settings.budget - settings.window_size
    scores = scores.nan_to_num(0.0)  # a broken model must still yield the number of rows that the host counts on
    counts = _counts_in_layer_top(_weighted(scores, valid, base), valid, num_kv_heads * min(base, columns))
    if settings.rounding == "paper":
        rows = torch.round((1.0 - settings.adakv_floor) * counts.double() + int(settings.adakv_floor * base)).long()
    else:
        floor = decimal_fraction(settings.adakv_floor)
        numerators = (floor.denominator - floor.numerator) * counts + floor.numerator * base
        rows = largest_fraction_on_device(numerators, floor.denominator)
    return torch.minimum(rows, valid.sum(-1))


def _weighted(scores: Tensor, valid: Tensor, base: int) -> Tensor:
    """Each head's scores times (its top-`base` mass / its whole mass); sums in float64."""
    present = scores.masked_fill(~valid, 0.0)
    top = present.topk(min(base, present.shape[-1]), dim=-1).values.sum(-1, keepdim=True, dtype=torch.float64)
    whole = present.sum(-1, keepdim=True, dtype=torch.float64)
    return scores.double() * (top / whole.clamp_min(torch.finfo(torch.float64).tiny))


def _counts_in_layer_top(weighted: Tensor, valid: Tensor, top: int) -> Tensor:
    """How many of the `top` largest entries of a layer each head owns: int64 `[batch, num_kv_heads]`.

    Entries equal to the last one taken go to the lower head, whatever order `topk` returns equal values in.
    """
    if top == 0:
        return torch.zeros(weighted.shape[:2], dtype=torch.long, device=weighted.device)
    ranked = weighted.masked_fill(~valid, -1.0)
    last = ranked.flatten(1).topk(top, dim=-1).values[:, -1].view(-1, 1, 1)
    above = (ranked > last).sum(-1)
    equal = ((ranked == last) & valid).sum(-1)
    room = top - above.sum(-1, keepdim=True) - (equal.cumsum(-1) - equal)
    return above + torch.minimum(room.clamp_min(0), equal)


ADAKV = Method(name="adakv", layer_budgets=adaptive_budgets)

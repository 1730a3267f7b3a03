"""PyramidKV: budgets fall linearly with depth, all heads of a layer alike."""

from __future__ import annotations

import torch
from torch import LongTensor

from sparsemm.methods.budgets import largest_fraction
from sparsemm.methods.method import BudgetRequest, Method


def pyramid_budgets(request: BudgetRequest) -> LongTensor:
    """Spec section 3, row `pyramidkv`, from this prompt's own length. Returns int64 `[num_layers, num_kv_heads]`."""
    settings, length, num_layers = request.settings, request.prompt_length, request.num_layers
    exact = settings.rounding == "exact"
    window, base = settings.window_size, settings.budget - settings.window_size
    if num_layers == 1 or (exact and settings.budget >= length):
        layers = [min(settings.budget, length)] * num_layers
    else:
        smallest = base // settings.pyramid_beta
        largest = 2 * base - smallest
        if largest >= length - window:
            largest = length - window
            smallest = 2 * base - largest
        if exact:
            layers = _exact_line(largest, smallest, num_layers, num_layers * base)
        else:
            step = (largest - smallest) // (num_layers - 1)
            layers = [largest - layer * step for layer in range(num_layers)]
        layers = [min(window + rows, length) for rows in layers]
    return torch.tensor(layers, dtype=torch.long).unsqueeze(1).repeat(1, request.num_kv_heads)


def _exact_line(largest: int, smallest: int, num_layers: int, total: int) -> list[int]:
    """The line from `largest` to `smallest`, rounded to sum `total`: floor, then +1 by largest fraction.

    Its points are multiples of 1 / (num_layers - 1), so integers find floors, fractions and ties without error.
    """
    steps = num_layers - 1
    points = [largest * steps - layer * (largest - smallest) for layer in range(num_layers)]
    return largest_fraction(points, steps, total=total)


PYRAMIDKV = Method(name="pyramidkv", model_budgets=pyramid_budgets)

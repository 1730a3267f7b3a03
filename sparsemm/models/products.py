"""Products of weights with a few rows, as decode steps have them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def linear_of_rows(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of `[rows, in_features]`; by a product of matrix and vector where that is faster.

    A single row of bfloat16 on a CPU: `linear` takes half as long again there, the rounding is the same.
    """
    if states.shape[0] != 1 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return linear(states, weight, bias)
    out = torch.mv(weight, states[0]) if bias is None else torch.addmv(bias, weight, states[0])
    return out[None]

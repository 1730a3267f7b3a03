"""Products of weights with a few rows, as decode steps have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linear_of_rows(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`linear` with these weights, of `[rows, in_features]`, prepared once.

    A single row of bfloat16 on a CPU is multiplied as a vector: as a matrix it takes half as long again there, the
    rounding is the same.
    """
    transposed = weight.t()

    def of_rows(states: Tensor) -> Tensor:
        return torch.mm(states, transposed) if bias is None else torch.addmm(bias, states, transposed)

    def of_row(states: Tensor) -> Tensor:
        if states.shape[0] != 1:
            return of_rows(states)
        out = torch.mv(weight, states[0]) if bias is None else torch.addmv(bias, weight, states[0])
        return out[None]

    return of_row if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" else of_rows

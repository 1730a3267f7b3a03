"""Products of weights with a few rows, as decode steps have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsemm.models.parallel import mesh_of, own

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


@dataclass(frozen=True)
class Product:
    """A linear layer by the part of its weight that this process has, without the bookkeeping of DTensors: one product
    and, where each process has some of the weight's columns, one all-reduce behind it.

    Attributes:
        weight: `[out_features, in_features]`, or a part of its rows or columns.
        bias: `[out_features]`, a part of it, or None.
        group: Over which results are summed, in place, as a CUDA graph can hold it; None where they are not.
    """

    weight: Tensor
    bias: Tensor | None
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, module: nn.Linear) -> Product:
        by_columns = any(each.is_shard(1) for each in getattr(module.weight, "placements", ()))
        group = mesh_of(module.weight).get_group() if by_columns else None
        return cls(own(module.weight), None if module.bias is None else own(module.bias), group)

    def bind(self) -> Callable[[Tensor], Tensor]:
        """The function from `[rows, its part of in_features]` to `[rows, its part of out_features]`, or to all of them
        where it is summed."""
        if self.group is None:
            return linear_of_rows(self.weight, self.bias)
        product, bias, group = linear_of_rows(self.weight), self.bias, self.group

        def summed(states: Tensor) -> Tensor:
            out = product(states)
            dist.all_reduce(out, group=group)
            return out if bias is None else out.add_(bias)  # once, not once a process

        return summed

"""Products with one row against those of PyTorch's linear layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from sparsemm.models.products import linear_of_rows


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_times_weights_are_as_exact_as_those_of_a_linear_layer(
    dtype: torch.dtype, rows: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 1031), (515, 1031), (515,))
    )
    whole = torch.randn(600, 1031, generator=generator).to(dtype)
    for each in (weight, whole[7:522]):  # alone, and as a part of merged weights
        given = (states, each, bias if with_bias else None)
        found, plain = linear_of_rows(*given[1:])(states), linear(*given)
        exact = linear(*(None if one is None else one.double() for one in given))
        assert found.shape == plain.shape and found.dtype == dtype
        assert (found.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm() + 1e-6 * exact.norm()

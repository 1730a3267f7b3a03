"""SnapKV: every head keeps `budget` rows, the window and those its last queries attend to most."""

from __future__ import annotations

import torch
from torch import LongTensor

from sparsemm.methods.method import BudgetRequest, Method


def uniform_budgets(request: BudgetRequest) -> LongTensor:
    """`min(budget, T)` for every head, under both roundings. Returns int64 `[num_layers, num_kv_heads]`."""
    rows = min(request.settings.budget, request.prompt_length)
    return torch.full((request.num_layers, request.num_kv_heads), rows, dtype=torch.long)


SNAPKV = Method(name="snapkv", model_budgets=uniform_budgets)

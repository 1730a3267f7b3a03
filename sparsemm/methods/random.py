"""The control of SparseMM: the same rule, with head scores drawn at random once per model."""

from __future__ import annotations

from sparsemm.budgets import score_budgets
from sparsemm.method import Method

RANDOM = Method(name="random", model_budgets=score_budgets, head_scores="random")

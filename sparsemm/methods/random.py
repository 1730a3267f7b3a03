"""The control of SparseMM: the same rule, with head scores drawn at random once per model."""

from __future__ import annotations

from sparsemm.methods.budgets import score_budgets
from sparsemm.methods.method import Method

RANDOM = Method(name="random", model_budgets=score_budgets, head_scores="random", seeded=True)

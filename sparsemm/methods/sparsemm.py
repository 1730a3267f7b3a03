"""SparseMM: every head keeps its window, a uniform share, and a share in proportion to its visual score."""

from __future__ import annotations

from sparsemm.methods.budgets import score_budgets
from sparsemm.methods.method import Method

SPARSEMM = Method(name="sparsemm", model_budgets=score_budgets, head_scores="given")

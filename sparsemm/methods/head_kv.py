"""HeadKV: every head keeps its window, a uniform share, and a share in proportion to its retrieval score."""

from __future__ import annotations

from fractions import Fraction

from torch import LongTensor

from sparsemm.methods.budgets import follow_scores
from sparsemm.methods.method import BudgetRequest, Method

BETA = Fraction(6, 5)
"""Every head gives 1 / beta of its rows to the pool that scores share out: 1.2, of the paper's 1.005 to 10."""


def retrieval_budgets(request: BudgetRequest) -> LongTensor:
    """w + (b - b/beta) + s_h N b/beta rows, b = budget - w, over N heads (Fu et al., "Not All Heads Matter", ICLR 2025,
    arXiv 2410.19258, section 3.2): int64 `[num_layers, num_kv_heads]`, rounded as SparseMM's `exact` rule.

    The scores s are those of a calibration (`sparsemm.calibration.page.retrieval_scores`): the paper's estimate, with
    a page's image tokens of the answer as the needle. The paper scores the heads of models without query groups; here
    those of a group are summed. Positions are ranked as SnapKV ranks them, as in every method of this kind.

    Raises:
        HeadScoreError: The calibration does not fit the model.
    """
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    return follow_scores(request, request.head_scores.curves.retrieval, 1 - 1 / BETA)


HEAD_KV = Method(name="head_kv", model_budgets=retrieval_budgets, head_scores="retrieval", paper_rounding=False)

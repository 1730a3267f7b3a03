"""HeadKV: every head keeps its window, a uniform share, and a share in proportion to its retrieval score."""

from __future__ import annotations

from fractions import Fraction

from torch import LongTensor

from sparsemm.methods.budgets import follow_scores
from sparsemm.methods.method import BudgetRequest, Method

BETA = Fraction(6, 5)
"""Every head gives 1 / beta of its rows to the pool that scores share out: 1.2. The paper reports the best of 1.005,
1.01, 1.1, 1.2, 1.5, 2, 5 and 10, a choice on the pages that are reported."""


def retrieval_budgets(request: BudgetRequest) -> LongTensor:
    """w + (b - b/beta) + s_h N b/beta rows, b = budget - w, over N heads (Fu et al., "Not All Heads Matter", ICLR 2025,
    arXiv 2410.19258, equation 4): int64 `[num_layers, num_kv_heads]`, rounded as SparseMM's `exact` rule.

    The scores s are those of a calibration (`sparsemm.calibration.page.retrieval_scores`): the paper's equation 2, with
    a page's image tokens of the answer as the needle. Of a group of query heads, of which the paper says nothing, they
    are summed. Positions are ranked as SnapKV ranks them (section 3.3).

    Raises:
        HeadScoreError: The calibration does not fit the model.
    """
    request.head_scores.check_shape(request.num_layers, request.num_query_heads)
    return follow_scores(request, request.head_scores.curves.retrieval, 1 - 1 / BETA)


HEAD_KV = Method(name="head_kv", model_budgets=retrieval_budgets, head_scores="retrieval", paper_rounding=False)

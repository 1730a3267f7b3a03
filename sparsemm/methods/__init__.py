"""The method table. A new method is one small file and one entry here (or one call of `register_method`)."""

from __future__ import annotations

from sparsemm.methods.adakv import ADAKV
from sparsemm.methods.expected_attention import EXPECTED_ATTENTION
from sparsemm.methods.fullkv import FULLKV
from sparsemm.methods.head_kv import HEAD_KV
from sparsemm.methods.keydiff import KEYDIFF
from sparsemm.methods.knorm import KNORM
from sparsemm.methods.mask import MASK
from sparsemm.methods.mask_random import MASK_RANDOM
from sparsemm.methods.method import (
    METHODS,
    BudgetRequest,
    Method,
    PromptStates,
    Settings,
    get_method,
    register_method,
)
from sparsemm.methods.mixkv import MIXKV
from sparsemm.methods.pyramidkv import PYRAMIDKV
from sparsemm.methods.random import RANDOM
from sparsemm.methods.rate_distortion import RATE_DISTORTION, RATE_DISTORTION_MIXKV
from sparsemm.methods.snapkv import SNAPKV, pooled_window_scores
from sparsemm.methods.sparsemm import SPARSEMM
from sparsemm.methods.streaming_llm import STREAMING_LLM
from sparsemm.methods.vl_cache import VL_CACHE

for _method in (
    FULLKV, STREAMING_LLM, KNORM, KEYDIFF, SNAPKV, PYRAMIDKV, ADAKV, EXPECTED_ATTENTION, VL_CACHE, MIXKV, HEAD_KV,
    SPARSEMM, RANDOM, RATE_DISTORTION, RATE_DISTORTION_MIXKV, MASK, MASK_RANDOM,
):  # fmt: skip
    register_method(_method)

__all__ = [
    "METHODS",
    "BudgetRequest",
    "Method",
    "PromptStates",
    "Settings",
    "get_method",
    "pooled_window_scores",
    "register_method",
]

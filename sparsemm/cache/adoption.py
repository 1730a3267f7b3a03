"""Whose cache a forward under the patch fills: ours, or the empty one of transformers that it was given."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from sparsemm.cache.cache import SparseCache
from sparsemm.errors import CacheError
from sparsemm.plan import Plan

_SHAPE = ("num_layers", "num_kv_heads", "head_dim", "sliding_windows")
"""What the plans of two caches for one model have in common."""


def adopt(cache: Any, plan: Plan) -> SparseCache:
    """Our cache, as it is or made of an empty one of transformers, in place.

    Args:
        cache: What a forward or `generate` was given; None for nothing.
        plan: Of a cache that is made.

    Raises:
        CacheError: Another kind of cache, a filled one, or one of a model of another shape.
    """
    if cache is None:
        return SparseCache(plan)
    if isinstance(cache, SparseCache):
        if any(getattr(plan, name) != getattr(cache.plan, name) for name in _SHAPE):
            raise CacheError("past_key_values is the cache of a model of another shape; start without it")
        return cache
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):  # what `generate` makes unasked
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold a different number of rows per head; "
            "leave cache_implementation and past_key_values unset under the patch"
        )
    if cache.get_seq_length() > 0:
        raise CacheError(
            "past_key_values was filled before the model was patched; start the patched generation without it"
        )
    # `generate` and callers keep a reference to the empty cache they made and expect it filled, so that very object
    # becomes the sparse cache.
    cache.__class__ = SparseCache
    SparseCache.__init__(cache, plan)
    return cache

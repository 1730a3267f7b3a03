"""The evicting key/value cache: per (layer, batch row, kv head) its own number of rows, really freed (spec section 7).

The attention forward (`sparsemm.attention`) calls `SparseLayer.store_prompt` for the first chunk of a sequence and
`SparseLayer.attend` for everything after it. All state lives in the cache, none on the model.
"""

from sparsemm.cache.adoption import adopt
from sparsemm.cache.cache import SparseCache
from sparsemm.cache.layer import SparseLayer
from sparsemm.cache.stats import CacheRecord, CacheStats, share_of_full

__all__ = ["CacheRecord", "CacheStats", "SparseCache", "SparseLayer", "adopt", "share_of_full"]

"""SparseMM: per-head key/value caches for vision-language models.

The names below are the public interface; each is imported when it is first used, so that `import sparsemm` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CompressionConfig": "sparsemm.config",
    "HeadScores": "sparsemm.head_scores",
    "head_budgets": "sparsemm.plan",
    "select_positions": "sparsemm.cache.selection",
    "patch": "sparsemm.patching",
    "PatchHandle": "sparsemm.patching",
    "SparseCache": "sparsemm.cache",
    "CacheStats": "sparsemm.cache",
    "generate": "sparsemm.decoding.generation",
    "GenerationOutput": "sparsemm.decoding.generation",
    "load_model": "sparsemm.models",
    "SparseMMError": "sparsemm.errors",
}

__all__ = [
    "__version__",
    "CacheStats",
    "CompressionConfig",
    "GenerationOutput",
    "HeadScores",
    "PatchHandle",
    "SparseCache",
    "SparseMMError",
    "generate",
    "head_budgets",
    "load_model",
    "patch",
    "select_positions",
]

if TYPE_CHECKING:
    from sparsemm.cache import CacheStats, SparseCache
    from sparsemm.cache.selection import select_positions
    from sparsemm.config import CompressionConfig
    from sparsemm.decoding.generation import GenerationOutput, generate
    from sparsemm.errors import SparseMMError
    from sparsemm.head_scores import HeadScores
    from sparsemm.models import load_model
    from sparsemm.patching import PatchHandle, patch
    from sparsemm.plan import head_budgets


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsemm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

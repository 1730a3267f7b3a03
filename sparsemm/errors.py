"""Exceptions of the package. Every message names the offending value and what to do about it."""

from __future__ import annotations


class SparseMMError(Exception):
    """Base class of all errors raised by this package."""


class ConfigError(SparseMMError, ValueError):
    """A setting is unknown, out of range, or inconsistent with another one."""


class HeadScoreError(SparseMMError, ValueError):
    """A head-score table has a wrong shape, a missing head, or values that are not scores."""


class UnsupportedModelError(SparseMMError, TypeError):
    """The model, or one of its settings, is not one that this package can serve correctly."""


class CacheError(SparseMMError, RuntimeError):
    """The key/value cache was asked for something it cannot do without giving wrong text."""


class PatchError(SparseMMError, RuntimeError):
    """A model was patched twice, or a patch was used after its removal."""


class DataError(SparseMMError, ValueError):
    """An input file or image is missing or does not have the documented form."""


class OperatorError(SparseMMError, ValueError, RuntimeError):
    """An operator of `torch.ops.sparsemm` got arguments that do not fit together. A RuntimeError too, because that is
    what the compiled kernels raise."""

"""SparseMM: per-head key/value caches for vision-language models."""

__version__ = "0.1.0"

"""The full cache: every row of every head is kept."""

from __future__ import annotations

from sparsemm.methods.method import Method

FULLKV = Method(name="fullkv")

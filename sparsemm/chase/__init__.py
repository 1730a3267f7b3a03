"""Chasing visual heads: which query heads look at the text that the model is reading (spec section 5)."""

from sparsemm.chase.page import READ_PROMPT, Page, chase_page, count_hits, read_page
from sparsemm.chase.run import chase, journal_path

__all__ = ["READ_PROMPT", "Page", "chase", "chase_page", "count_hits", "journal_path", "read_page"]

"""Experiments on pages: every method at every budget, masked heads, changed rows of single heads."""

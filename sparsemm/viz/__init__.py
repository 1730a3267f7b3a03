"""Pictures: head scores, budgets, what heads look at, which positions survive. Nothing here needs a display."""

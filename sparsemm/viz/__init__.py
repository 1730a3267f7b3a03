"""Pictures: head scores, budgets, what heads look at, which rows survive.

Every `draw_…` returns a figure, for `sparsemm.runs.plots.save_figure`. Nothing needs a display, and nothing is measured
but what a model reads and keeps of one page; layer 0 is above the others everywhere.
"""

"""lmms-eval plug-in of SparseMM: two models, two offline tasks, and a runner of method x budget x task grids."""

from __future__ import annotations

from pathlib import Path

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
"""For lmms-eval's `--include_path`."""

"""Measurements: operators, decode steps, memory."""

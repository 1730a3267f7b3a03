"""Miniatures: small real checkpoints of the three families, and the training that makes them."""

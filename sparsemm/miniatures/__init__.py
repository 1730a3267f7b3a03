"""Miniatures: small real checkpoints of several families, and the training that makes them."""

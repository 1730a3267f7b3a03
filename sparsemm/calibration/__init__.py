"""Rate and distortion: how much the answer depends on each head, and how many rows a head needs (spec section 10)."""

from sparsemm.calibration.run import calibrate, journal_path

__all__ = ["calibrate", "journal_path"]

"""The settings of one compression run, checked as a whole before any model is touched."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
from dataclasses import dataclass
from typing import Any, Literal

from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import get_method

_CHOICES: dict[str, tuple[str, ...]] = {
    "rounding": ("exact", "paper"),
    "mask_mode": ("zero_query", "zero_output"),
    "compress_turns": ("first", "every"),
}


@dataclass(frozen=True)
class CompressionConfig:
    """Which method runs, and with what budget. Validated on creation; immutable afterwards.

    Args:
        method: A name of `sparsemm.methods.METHODS`.
        budget: Mean number of prompt rows kept per (layer, kv head), the window included. May be None for
            the methods that keep every row (`fullkv`, `mask`, `mask_random`), which ignore it.
        head_scores: Visual-head scores, or the path of a file of them. Needed by `sparsemm`, `mask`, `mask_random`;
            `rate_distortion`, `rate_distortion_mixkv` and `head_kv` need a calibration.
        window_size: Last prompt tokens, always kept, whose queries score the others (SnapKV's observation window).
        kernel_size: Odd width of the average pooling of position scores.
        ratio: Share of the budget beyond the window that every head gets alike (rho of the paper, Table 1).
        rounding: `exact` keeps `min(budget, T) * L * Hkv` rows in all; `paper` is the original release's rounding.
        adakv_floor: Share of the budget beyond the window that AdaKV gives every head alike.
        pyramid_beta: PyramidKV's shallowest budget beyond the window is `(budget - window_size) // pyramid_beta`.
        mask_ratio: Share of all query heads that `mask` and `mask_random` mask.
        mask_mode: `zero_query` (uniform attention, as the original) or `zero_output` (the head contributes nothing).
        seed: Seed of the random head scores of `random` and of the random heads of `mask_random`.
        compress_turns: `first` compresses the first prompt only; `every` lets kept rows and new chunk compete again.

    Raises:
        ConfigError: A value is unknown, out of range, or inconsistent with another; the message names it.
    """

    method: str
    budget: int | None = None
    head_scores: str | os.PathLike[str] | HeadScores | None = None
    window_size: int = 32
    kernel_size: int = 5
    ratio: float = 0.1
    rounding: Literal["exact", "paper"] = "exact"
    adakv_floor: float = 0.2
    pyramid_beta: int = 20
    mask_ratio: float = 0.1
    mask_mode: Literal["zero_query", "zero_output"] = "zero_query"
    seed: int = 0
    compress_turns: Literal["first", "every"] = "first"

    def __post_init__(self) -> None:
        for name in ("window_size", "kernel_size", "pyramid_beta"):
            self._check_integer(name, minimum=1)
        self._check_integer("seed", minimum=0)
        for name in ("ratio", "adakv_floor", "mask_ratio"):
            self._check_fraction(name)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size} is even; pooling is centred, use an odd width such as 5")
        self._check_method()

    def _check_method(self) -> None:
        method = get_method(self.method)
        if self.head_scores is not None and not isinstance(self.head_scores, (str, os.PathLike, HeadScores)):
            raise ConfigError(
                f"head_scores is a {type(self.head_scores).__name__}; give the path of a score file, or wrap the "
                "table as sparsemm.HeadScores(values)"
            )
        if method.needs_head_scores and self.head_scores is None:
            maker = "`sparsemm calibrate`" if method.needs_calibration else "the visual-head chase"
            raise ConfigError(
                f"method={self.method!r} needs head_scores: give the path of a file made by {maker}, or a HeadScores"
            )
        if self.rounding == "paper" and not method.paper_rounding:
            raise ConfigError(
                f"rounding='paper' is how the original release rounds its methods, and method={self.method!r} is none "
                "of them; use rounding='exact'"
            )
        if self.budget is not None:
            self._check_integer("budget", minimum=1)
        if not method.compresses:
            return
        if self.budget is None:
            raise ConfigError(
                f"method={self.method!r} needs a budget: the mean number of rows kept per head, "
                f"at least window_size={self.window_size}"
            )
        if self.budget < self.window_size:
            raise ConfigError(
                f"budget={self.budget} is smaller than window_size={self.window_size}, whose rows are always kept; "
                "raise the budget or make the window smaller"
            )

    def _check_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        try:
            if isinstance(value, bool):
                raise TypeError
            integer = operator.index(value)
        except TypeError:
            raise ConfigError(f"{name}={value!r} is not an integer; give a whole number >= {minimum}") from None
        if integer < minimum:
            raise ConfigError(f"{name}={value!r} is too small; it must be >= {minimum}")
        object.__setattr__(self, name, integer)

    def _check_fraction(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ConfigError(f"{name}={value!r} is not a number; give one between 0 and 1")
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"{name}={value!r} is out of range; it must lie between 0 and 1")
        object.__setattr__(self, name, float(value))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, for storing beside results; head scores as their path or a description."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.head_scores, HeadScores):
            values["head_scores"] = self.head_scores.describe()
        elif self.head_scores is not None:
            values["head_scores"] = os.fspath(self.head_scores)
        return values

"""What a method is: a row of a table that answers how many rows a head keeps, and which heads are masked.

The rules themselves, and the rows they make up, are in the files beside this one, one small file each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import BoolTensor, LongTensor, Tensor

from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores


class Settings(Protocol):
    """The settings that rules read; `sparsemm.CompressionConfig` has them, with their meaning."""

    budget: int | None
    window_size: int
    kernel_size: int
    ratio: float
    rounding: Literal["exact", "paper"]
    adakv_floor: float
    pyramid_beta: int
    mask_ratio: float
    seed: int


@dataclass(frozen=True)
class BudgetRequest:
    """What a budget rule may look at. One prompt of `prompt_length` valid tokens (padding excluded)."""

    settings: Settings
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    prompt_length: int
    head_scores: HeadScores | None = None


ModelBudgetRule = Callable[[BudgetRequest], LongTensor]
"""`rule(request) -> LongTensor [num_layers, num_kv_heads]` on the CPU: rows kept, window included."""

LayerBudgetRule = Callable[[Settings, Tensor, Tensor], Tensor]
"""`rule(settings, scores, valid) -> LongTensor [batch, num_kv_heads]`: rows kept beyond the window in one layer.

`scores` float32 and `valid` bool are `[batch, num_kv_heads, columns]`, both on the device: the scores of the columns
before the window, and which of them hold a row. The rule must not read a value back to the host: under `exact` the
rows of a layer have to sum to `num_kv_heads * (budget - window_size)`, which the caller relies on. What it says about
prompts that the budget covers is replaced by "all rows".
"""

PositionScorer = Callable[[Settings, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
"""`scorer(settings, query, key, starts, num_queries, columns, scaling) -> float32 [batch, num_kv_heads, columns]`.

`query` `[batch, num_query_heads, n, head_dim]` are the last n queries, `key` `[batch, num_kv_heads, seq_len, head_dim]`
the keys right-aligned, `starts` int32 `[batch, num_kv_heads]` the first valid column, `num_queries` int32 `[batch]` how
many of the n queries are valid, `scaling` the attention module's factor of the logits. Higher is kept first; values of
columns before `starts` are not read.
"""

MaskRule = Callable[[Settings, HeadScores], BoolTensor]
"""`rule(settings, head_scores) -> BoolTensor [num_layers, num_query_heads]`, True where the head is masked."""


@dataclass(frozen=True)
class Method:
    """One row of the method table (spec section 3).

    Attributes:
        name: The name users give.
        model_budgets: Rows per head from the prompt length alone. At most one of this and `layer_budgets`.
        layer_budgets: Rows per head from the position scores of the layer (AdaKV).
        head_scores: Where head scores come from: `none`, `given` by the configuration, with the curves of a
            calibration (`calibrated`), or drawn at `random`.
        score_positions: Ranks the columns before the window; None is SnapKV's scoring (spec section 2).
        masked_heads: Which query heads are masked; None is no head.
        paper_rounding: Whether there is such a thing as the original release's rounding of this method.
    """

    name: str
    model_budgets: ModelBudgetRule | None = None
    layer_budgets: LayerBudgetRule | None = None
    head_scores: Literal["none", "given", "calibrated", "random"] = "none"
    score_positions: PositionScorer | None = None
    masked_heads: MaskRule | None = None
    paper_rounding: bool = True

    def __post_init__(self) -> None:
        if self.model_budgets is not None and self.layer_budgets is not None:
            raise ValueError(f"method {self.name!r} has two budget rules; give model_budgets or layer_budgets")

    @property
    def needs_head_scores(self) -> bool:
        """Whether the configuration has to give head scores."""
        return self.head_scores in ("given", "calibrated")

    @property
    def compresses(self) -> bool:
        """Whether prompt rows are dropped at all."""
        return self.model_budgets is not None or self.layer_budgets is not None

    def budgets(self, request: BudgetRequest) -> LongTensor:
        """Rows that each kv head keeps: int64 `[num_layers, num_kv_heads]`; the whole prompt without a rule.

        Raises `ConfigError` for methods whose budgets depend on the attention scores of the input.
        """
        if self.layer_budgets is not None:
            raise ConfigError(
                f"the budgets of method={self.name!r} depend on the attention scores of the input; "
                "use sparsemm.select_positions, or read them from handle.stats after a prompt"
            )
        if self.model_budgets is None:
            return torch.full((request.num_layers, request.num_kv_heads), request.prompt_length, dtype=torch.long)
        return self.model_budgets(request)


METHODS: dict[str, Method] = {}
"""The table, by name; `sparsemm.methods` puts this package's rows into it."""


def get_method(name: str) -> Method:
    """The method called `name`. Raises `ConfigError` listing the known names."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ConfigError(f"method={name!r} is unknown; use one of {', '.join(sorted(METHODS))}")
    return method


def register_method(method: Method, *, replace: bool = False) -> Method:
    """Add a method to the table and return it. Raises `ConfigError` when the name is taken and `replace` is off."""
    if method.name in METHODS and not replace:
        raise ConfigError(f"method {method.name!r} is already registered; choose another name or pass replace=True")
    METHODS[method.name] = method
    return method

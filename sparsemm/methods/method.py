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


@dataclass(frozen=True)
class PromptStates:
    """What one layer holds of the prompts whose rows are chosen among; valid columns lie at the right end.

    Attributes:
        query: `[batch, num_query_heads, n, head_dim]` after RoPE, of the last n <= seq_len columns: of a whole
            prompt, or of the new columns of a later turn.
        key: `[batch, num_kv_heads, seq_len, head_dim]` after RoPE.
        starts: int32 `[batch, num_kv_heads]`, the first valid column of each list.
        num_queries: int32 `[batch]`, how many of the n queries are valid (the last ones).
        window_size: So many last columns are kept whatever their score.
        scaling: The attention module's factor of the logits.
        value: `[batch, num_kv_heads, seq_len, head_dim]`.
        image: bool `[batch, n]`, which of the queries' tokens show an image.
        unrotated: The queries before RoPE, float32 `[batch, num_query_heads, n, head_dim]`.
        ahead: Mean rotation of the positions to come, float32 `[batch, head_dim, head_dim]`: the query that a
            token will have is, in the mean, `ahead @ unrotated`.
        ranking: bool `[num_kv_heads]`, which heads follow the second of a method's two rankings (`Method.rankings`).

    The last five are there for the methods that name them (`Method.sees`) or have that rule; else they may be None.
    """

    query: Tensor
    key: Tensor
    starts: Tensor
    num_queries: Tensor
    window_size: int
    scaling: float
    value: Tensor | None = None
    image: Tensor | None = None
    unrotated: Tensor | None = None
    ahead: Tensor | None = None
    ranking: Tensor | None = None

    @property
    def columns(self) -> int:
        """How many columns lie before the window: those to be ranked."""
        return max(0, self.key.shape[2] - self.window_size)

    @property
    def valid(self) -> Tensor:
        """Which columns hold a row: bool `[batch, num_kv_heads, seq_len]`."""
        return torch.arange(self.key.shape[2], device=self.key.device) >= self.starts[..., None]


ModelBudgetRule = Callable[[BudgetRequest], LongTensor]
"""`rule(request) -> LongTensor [num_layers, num_kv_heads]` on the CPU: rows kept, window included."""

LayerBudgetRule = Callable[[Settings, Tensor, Tensor], Tensor]
"""`rule(settings, scores, valid) -> LongTensor [batch, num_kv_heads]`: rows kept beyond the window in one layer.

`scores` float32 and `valid` bool are `[batch, num_kv_heads, columns]`, both on the device: the scores of the columns
before the window, and which of them hold a row. The rule must not read a value back to the host: under `exact` the
rows of a layer have to sum to `num_kv_heads * (budget - window_size)`, which the caller relies on. What it says about
prompts that the budget covers is replaced by "all rows".
"""

PositionScorer = Callable[[Settings, PromptStates], Tensor]
"""`scorer(settings, states) -> float32 [batch, num_kv_heads, columns]` of the columns before the window.

Higher is kept first; values of columns before `starts` are not read.
"""

LayerScorer = Callable[[Settings, PromptStates], tuple[Tensor, Tensor]]
"""A position scorer that also says of its layer what the budgets depend on: `[batch, num_kv_heads]`."""

PromptBudgetRule = Callable[[BudgetRequest, Tensor], LongTensor]
"""`rule(request, said) -> LongTensor [num_layers, num_kv_heads]` on the CPU: rows kept, window included, of one prompt.

`said` float64 `[num_layers, num_kv_heads]` is what the layer scorer said of every layer. The rule runs once the last
layer has run; until then every layer holds the whole prompt, so a prefill needs the memory of a full cache. The rule is
not asked about prompts that the budget covers.
"""

MaskRule = Callable[[Settings, HeadScores], BoolTensor]
"""`rule(settings, head_scores) -> BoolTensor [num_layers, num_query_heads]`, True where the head is masked."""


RankingRule = Callable[[HeadScores, int], BoolTensor]
"""`rule(head_scores, num_kv_heads) -> BoolTensor [num_layers, num_kv_heads]`, True where the head's rows are ranked by
the second of the method's two rankings."""


@dataclass(frozen=True)
class Method:
    """One row of the method table (spec section 3).

    Attributes:
        name: The name users give.
        model_budgets: Rows per head from the prompt length alone. At most one of the three budget rules.
        layer_budgets: Rows per head from the position scores of the layer (AdaKV).
        prompt_budgets: Rows per head from what `score_layer` said of all layers, after the last one (VL-Cache).
        head_scores: Where head scores come from: `none`, `given` by the configuration, with the curves of a
            calibration (`calibrated`; for MixKV's ranking `calibrated_mixkv`) or its retrieval scores (`retrieval`), or
            drawn at `random`.
        score_positions: Ranks the columns before the window; None is SnapKV's scoring (spec section 2).
        rankings: Which of two rankings a head follows, for a scorer that has two.
        score_layer: In its place where there is a `prompt_budgets`.
        sees: What the scorer reads of `PromptStates` beside keys and queries: "value", "image", "unrotated", "ahead".
        positions_ahead: How many positions `PromptStates.ahead` is the mean rotation of.
        masked_heads: Which query heads are masked; None is no head.
        paper_rounding: Whether there is such a thing as the original release's rounding of this method.
        seeded: Whether something is drawn by `settings.seed`: results with several seeds are then shown as their mean.
    """

    name: str
    model_budgets: ModelBudgetRule | None = None
    layer_budgets: LayerBudgetRule | None = None
    prompt_budgets: PromptBudgetRule | None = None
    head_scores: Literal["none", "given", "calibrated", "calibrated_mixkv", "retrieval", "random"] = "none"
    score_positions: PositionScorer | None = None
    rankings: RankingRule | None = None
    score_layer: LayerScorer | None = None
    sees: tuple[str, ...] = ()
    positions_ahead: int = 0
    masked_heads: MaskRule | None = None
    paper_rounding: bool = True
    seeded: bool = False

    def __post_init__(self) -> None:
        rules = (self.model_budgets, self.layer_budgets, self.prompt_budgets)
        if sum(rule is not None for rule in rules) > 1:
            raise ValueError(
                f"method {self.name!r} has two budget rules; give model_budgets, layer_budgets or prompt_budgets"
            )
        if (self.prompt_budgets is None) != (self.score_layer is None):
            raise ValueError(f"method {self.name!r} has one of prompt_budgets and score_layer; give both")

    @property
    def needs_head_scores(self) -> bool:
        """Whether the configuration has to give head scores."""
        return self.head_scores == "given" or self.needs_calibration

    @property
    def needs_calibration(self) -> bool:
        """Whether those have to be a calibration."""
        return self.head_scores in ("calibrated", "calibrated_mixkv", "retrieval")

    @property
    def compresses(self) -> bool:
        """Whether prompt rows are dropped at all."""
        return any(rule is not None for rule in (self.model_budgets, self.layer_budgets, self.prompt_budgets))

    def budgets(self, request: BudgetRequest) -> LongTensor:
        """Rows that each kv head keeps: int64 `[num_layers, num_kv_heads]`; the whole prompt without a rule.

        Raises `ConfigError` for methods whose budgets depend on the attention scores of the input.
        """
        if self.layer_budgets is not None or self.prompt_budgets is not None:
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

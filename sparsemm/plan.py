"""One plan from a configuration and a model's shape: head scores, masked heads, budgets by prompt length.

Everything that the method table and the score files have to say is asked here, once; attention and cache are handed
the answers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from sparsemm.config import CompressionConfig
from sparsemm.errors import ConfigError, HeadScoreError, PatchError
from sparsemm.head_scores import HeadScores
from sparsemm.methods import BudgetRequest, Method, get_method
from sparsemm.models.identity import identity_of
from sparsemm.models.instances import device_of
from sparsemm.models.layers import sliding_windows
from sparsemm.models.parallel import ALONE, TensorParallel, tensor_parallel_of
from sparsemm.ops.backends import resolve_backend
from sparsemm.runs.results import versions

GROWTH_ROWS = 64
"""Slots behind every head's prompt rows, and the least number that a full cache grows by."""

_REMEMBERED_LENGTHS = 1024  # a long evaluation meets many prompt lengths; none is worth keeping for ever


@dataclass(frozen=True)
class Plan:
    """What every cache of one patched model has in common.

    Args:
        config: Method and settings; its score file is read, and random scores drawn, when the plan is made.
        num_layers, num_query_heads, num_kv_heads: Shape of the language model; only layers with ragged rows count.
        head_dim: Size of a key or value row; None where no cache is made from the plan.
        reserve: Slots allocated behind the prompt rows of every head.
        decode_backend: Who attends to the ragged rows, a name of `sparsemm.ops.backends.BACKENDS`.
        sliding_windows: Of each decoder layer, the window of one that keeps transformers' own attention and cache, or
            None; `()` where there are no such layers.
        parallel: The processes that hold the model. Budgets and masks are those of the whole model in each of them; a
            cache has the rows of its own process's heads.

    Attributes:
        method: The row of the method table.
        head_scores: Given, drawn from the seed, or None where the method needs none. The draw, uniform
            `[num_layers, num_query_heads]`, depends on the seed and the shape only.
        masked_heads: bool `[num_layers, num_query_heads]`, True for the query heads that the method masks (spec
            section 6).
        rankings: bool `[num_layers, num_kv_heads]`, of a method with two rankings the heads that follow the second.

    Raises:
        ConfigError: A size is out of range, or more heads are to be masked than there are.
        HeadScoreError: The scores do not fit the model, or their file cannot be used.
    """

    config: CompressionConfig
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    reserve: int = GROWTH_ROWS
    decode_backend: str = "auto"
    sliding_windows: tuple[int | None, ...] = ()
    parallel: TensorParallel = ALONE
    method: Method = field(init=False)
    head_scores: HeadScores | None = field(init=False)
    masked_heads: BoolTensor = field(init=False, repr=False, compare=False)
    rankings: BoolTensor | None = field(init=False, repr=False, compare=False)
    _budgets: dict[int, LongTensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sliding_windows and self.sliding_windows.count(None) != self.num_layers:
            raise ConfigError(
                f"{self.num_layers} layers keep ragged rows, {self.sliding_windows.count(None)} do not slide"
            )
        if self.num_query_heads < 1 or self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_query_heads={self.num_query_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        shape = (self.num_layers, self.num_query_heads)
        method = get_method(self.config.method)
        head_scores = _head_scores(self.config, method, shape)
        masked = torch.zeros(shape, dtype=torch.bool)
        if method.masked_heads is not None:
            masked = method.masked_heads(self.config, head_scores)
        rankings = None if method.rankings is None else method.rankings(head_scores, self.num_kv_heads)
        resolved = {"method": method, "head_scores": head_scores, "masked_heads": masked, "rankings": rankings}
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def budgets(self, prompt_length: int) -> LongTensor:
        """Rows per head `[num_layers, num_kv_heads]`, window included, for so many valid tokens.

        Raises `ConfigError` for a negative length, and for methods whose budgets depend on the attention scores.
        """
        if prompt_length < 0:
            raise ConfigError(f"prompt_length={prompt_length} is negative; give the number of valid prompt tokens")
        if prompt_length not in self._budgets:
            if len(self._budgets) >= _REMEMBERED_LENGTHS:
                self._budgets.clear()
            shape = (self.num_layers, self.num_query_heads, self.num_kv_heads)
            request = BudgetRequest(self.config, *shape, prompt_length, self.head_scores)
            self._budgets[prompt_length] = self.method.budgets(request)
        return self._budgets[prompt_length]

    @property
    def own_kv_heads(self) -> int:
        """Number of kv heads whose rows this process holds."""
        own = self.parallel.own(self.num_kv_heads)
        return own.stop - own.start

    def own_budgets(self, prompt_length: int) -> LongTensor:
        """The part of `budgets` for the heads of this process: `[num_layers, own_kv_heads]`."""
        return self.budgets(prompt_length)[:, self.parallel.own(self.num_kv_heads)]

    @property
    def own_masked_heads(self) -> BoolTensor:
        """The part of `masked_heads` for the query heads of this process."""
        return self.masked_heads[:, self.parallel.own(self.num_query_heads)]

    def describe(self) -> dict[str, Any]:
        """What all processes that hold a model have to have alike, as JSON values."""
        scores = None if self.head_scores is None else self.head_scores.describe()["sha256"]
        found = versions()
        return {
            **self.config.to_dict(),
            "head_scores": scores,
            "shape": [self.num_layers, self.num_query_heads, self.num_kv_heads, self.head_dim],
            "kv heads a process": self.own_kv_heads,
            "reserve": self.reserve,
            **{name: found[name] for name in ("sparsemm", "torch", "transformers")},
        }

    def decides_last(self, prompt_lengths: Sequence[int | None]) -> bool:
        """Whether the rows of such prompts are chosen after the last layer has run; None is one that keeps all rows."""
        if self.method.prompt_budgets is None:
            return False
        return any(length is not None and length > self.config.budget for length in prompt_lengths)

    def prompt_budgets(self, prompt_length: int | None, said: Tensor) -> LongTensor | None:
        """As `budgets`, for methods that decide last: `said` float64 `[num_layers, num_kv_heads]` is what their
        scorer said of every layer. None for a prompt that keeps all rows."""
        if not self.decides_last([prompt_length]):
            return None
        shape = (self.num_layers, self.num_query_heads, self.num_kv_heads)
        return self.method.prompt_budgets(BudgetRequest(self.config, *shape, prompt_length, self.head_scores), said)

    def with_reserve(self, reserve: int) -> Plan:
        """The same plan with other slack; nothing is resolved again, and the budgets computed so far are shared."""
        plan = copy.copy(self)
        object.__setattr__(plan, "reserve", reserve)
        return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable, shared by copies of a cache


def agreed_plan(
    model: nn.Module,
    text_model: nn.Module,
    config: CompressionConfig,
    own_kv_heads: int,
    reserve: int,
    decode_backend: str,
) -> Plan:
    """The plan of a model, the same in every process that holds it; `own_kv_heads` are in this one.

    Raises:
        ConfigError: The backend is unknown or cannot serve this model, or a size is out of range.
        HeadScoreError: The head scores do not fit the model, belong to another one, or cannot be read.
        PatchError: The processes differ in settings, files, weights or versions; raised in all of them.
    """
    parallel = tensor_parallel_of(text_model)
    needed = parallel.size > 1 or get_method(config.method).needs_head_scores
    identity = identity_of(model) if needed else None
    held = dataclasses.replace(parallel, divided=own_kv_heads != text_model.config.num_key_value_heads)

    def make() -> Plan:
        plan = _plan_of(text_model, config, reserve, decode_backend, held)
        if plan.method.needs_head_scores:
            plan.head_scores.check_model(identity)
        return plan

    plan = parallel.together(make)
    if parallel.size > 1:
        _refuse_differences(parallel.collect({"weights": identity.weights, **plan.describe()}))
    return plan


def _plan_of(
    text_model: nn.Module, config: CompressionConfig, reserve: int, decode_backend: str, parallel: TensorParallel
) -> Plan:
    text_config, windows = text_model.config, sliding_windows(text_model.config)
    attention = text_model.layers[windows.index(None)].self_attn
    device = device_of(attention)
    if decode_backend != "auto" and device.type != "meta":  # better refused here than in the middle of a prompt
        resolve_backend(decode_backend, device, text_model.dtype, attention.head_dim)
    return Plan(
        config=config,
        num_layers=windows.count(None),
        num_query_heads=text_config.num_attention_heads,
        num_kv_heads=text_config.num_key_value_heads,
        head_dim=attention.head_dim,
        reserve=reserve,
        decode_backend=decode_backend,
        sliding_windows=windows if any(windows) else (),
        parallel=parallel,
    )


def _refuse_differences(plans: list[dict[str, Any]]) -> None:
    """Raise `PatchError` unless all processes that hold a model describe the same plan."""
    differences = [
        f"{name} is {' / '.join(str(each[name]) for each in plans)}"
        for name in plans[0]
        if any(each[name] != plans[0][name] for each in plans)
    ]
    if differences:
        raise PatchError(
            f"the {len(plans)} processes that hold the model do not agree: {'; '.join(differences)}; start all of them "
            "with the same settings, files and versions"
        )


def head_budgets(
    config: CompressionConfig, *, num_layers: int, num_query_heads: int, num_kv_heads: int, prompt_length: int
) -> LongTensor:
    """Rows that each kv head keeps of a prompt, window included: int64 `[num_layers, num_kv_heads]`.

    Args:
        config: Method, budget, rounding and their settings; names the head scores, or the seed that draws them.
        num_layers, num_query_heads, num_kv_heads: Shape of the language model.
        prompt_length: Valid tokens of the prompt, padding excluded.

    Raises:
        ConfigError: The method's budgets depend on attention scores (`adakv`, `vl_cache`), or a size is out of range.
        HeadScoreError: The head scores do not fit the model.
    """
    return Plan(config, num_layers, num_query_heads, num_kv_heads).budgets(prompt_length).clone()


def _head_scores(config: CompressionConfig, method: Method, shape: tuple[int, int]) -> HeadScores | None:
    if method.head_scores == "none":
        return None
    if method.head_scores == "random":
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
        return HeadScores(drawn, source="seeded uniform draw", seed=config.seed)
    scores = config.head_scores if isinstance(config.head_scores, HeadScores) else HeadScores.load(config.head_scores)
    scores.check_shape(*shape)
    if method.needs_calibration and scores.curves is None:
        raise HeadScoreError(
            f"method={method.name!r} needs a calibration, which `sparsemm calibrate` makes; "
            f"{config.head_scores} holds head scores only"
        )
    if method.head_scores == "retrieval" and scores.curves.retrieval is None:
        raise HeadScoreError(
            f"method={method.name!r} follows retrieval scores, and none of the pages that {config.head_scores} was "
            "calibrated on said where its answer stands; calibrate again with such pages (those of the miniatures do)"
        )
    if method.head_scores == "calibrated_mixkv" and scores.curves.distortions_mixkv is None:
        raise HeadScoreError(
            f"method={method.name!r} needs the curves of MixKV's ranking, which {config.head_scores} does not hold; "
            "calibrate again"
        )
    return scores

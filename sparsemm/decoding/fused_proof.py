"""Proof that fused layers compute what the decoder layers of a model do."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

import torch
from torch import Tensor

from sparsemm.cache import SparseLayer
from sparsemm.decoding.fused_layer import (
    FusedLayer,
    LayerRule,
    NotRecognisedError,
    StepRules,
    nearly_equal,
    norm_rule,
    read_layer,
)
from sparsemm.decoding.step import DecodeStep
from sparsemm.models.projections import Projections

logger = logging.getLogger(__name__)


@torch.no_grad()
def prove_rules(step: DecodeStep, projections: tuple[Projections | None, ...]) -> StepRules:
    """The rules of the layers of `step.model` that are recognised, each shown to give the layer's own output and rows
    on random hidden states; what runs as it is is said in the log. The processes that hold the model agree on them.

    To be called between `cache.begin_steps` and taking the columns back, with room for a token.
    """
    layers: list[LayerRule | None] = []
    reasons: dict[str, list[int]] = {}
    factors = step.rotary_factors(step.like)
    for layer_idx, each in enumerate(projections):
        try:
            layers.append(_prove(step, layer_idx, each, factors[layer_idx]))
        except NotRecognisedError as error:
            layers.append(None)
            reasons.setdefault(str(error), []).append(layer_idx)
    for reason, indices in reasons.items():
        logger.info(
            "%d of %d decoder layers of %s take their own forward in decode steps: %s",
            len(indices), len(layers), type(step.model).__name__, reason,
        )  # fmt: skip
    norm = None
    with contextlib.suppress(NotRecognisedError):
        norm = step.cache.plan.parallel.together(lambda: norm_rule(step.text_model.norm))
    return StepRules(tuple(layers), norm)


def _prove(
    step: DecodeStep, layer_idx: int, projections: Projections | None, factors: tuple[Tensor, Tensor]
) -> LayerRule:
    layer, rows, parallel = step.text_model.layers[layer_idx], step.cache.layers[layer_idx], step.cache.plan.parallel
    read = parallel.together(lambda: read_layer(layer, projections))
    norm = layer.input_layernorm.weight
    states = torch.randn(
        step.batch, step.text_model.config.hidden_size, generator=torch.Generator().manual_seed(layer_idx)
    ).to(norm.device, norm.dtype)
    lens = rows.lens.clone()
    expected = step.own_layer(layer, states, factors)
    expected_rows = _last_rows(rows)

    def difference(candidate: LayerRule) -> str | None:
        rows.lens.copy_(lens)
        residual = states / 4  # an exact quarter: the sum of both is what the layer was given
        try:
            found = torch.add(*FusedLayer(layer, candidate, projections, rows)(states - residual, residual, factors))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # sizes or strides that the kernels refuse
            return str(error)
        pairs = zip((found, *_last_rows(rows)), (expected, *expected_rows), strict=True)
        if all(nearly_equal(ours, theirs) for ours, theirs in pairs):
            return None
        return "its output, or the rows that it stores, are not those of norm, attention, norm and MLP"

    for candidate in (read, dataclasses.replace(read, interleaved=True)):
        reason = parallel.first_of(difference(candidate))
        if reason is None:
            return candidate
    raise NotRecognisedError(reason)


def _last_rows(rows: SparseLayer) -> tuple[Tensor, Tensor]:
    """The newest key and value of every list."""
    slots = (rows.offsets[:-1] + rows.lens - 1).long()
    return rows.key_buffer[slots], rows.value_buffer[slots]

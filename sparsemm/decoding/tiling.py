"""Prompts in less memory and time: what works on each token by itself runs in tiles, and by the fused operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.decoding.fused_layer import (
    ANY_ROW,
    Norm,
    NormRule,
    NotRecognisedError,
    activation_of,
    norm_rule,
)
from sparsemm.models.instances import Findings, as_built, forward_name, set_on_instance
from sparsemm.models.parallel import TensorParallel, tensor_parallel_of
from sparsemm.models.rotation import nearly_equal
from sparsemm.ops.backends import operators

PROMPT_TILE = 2048
"""Tokens at a time: enough for full matrix throughput, and 1/16 of the MLP's activations of a 32K prompt."""

_TOKEN_BY_TOKEN = ("norm", "mlp", "feed_forward", "feedforward", "moe")  # in the names of a decoder layer's parts
_PROVED_ON = 4  # random tokens

_found: Findings[list[NormRule | str | None]] = Findings()


@contextmanager
def tiled_prompt(text_model: nn.Module, tile: int | None = PROMPT_TILE) -> Iterator[None]:
    """Run norms and feed-forward parts of the decoder layers over `tile` tokens at a time while the context lasts.

    The MLP's intermediate activations and the norms' float32 copies are the largest tensors of a long prompt once
    attention holds no matrix. (Norms of queries and keys are tiled with their rotation, see `Projections.project`.)
    Norms that are shown to be those of `add_rms_norm` run by it, all at once: it makes no copies. MLPs that are shown
    to be gated by an activation of `ACTIVATIONS` have it in one pass. Results agree within float error (matrix products
    of other heights round differently, sums in another order). Only instances are touched, and put back at the end.
    `tile=0`: all tokens at once. `tile=None` changes nothing.
    """
    if tile is None:
        yield
        return
    named = [each for layer in text_model.layers for each in layer.named_children()]
    parts = [part for name, part in named if any(kind in name for kind in _TOKEN_BY_TOKEN)] + [text_model.norm]
    parallel = tensor_parallel_of(text_model)
    rules = _found.about(text_model, parts, lambda: [_rule_of(module, parallel) for module in parts])
    with ExitStack() as stack:
        for module, rule in zip(parts, rules, strict=True):
            stack.enter_context(_in_place(module, rule, tile))
        yield


@torch.no_grad()
def _rule_of(module: nn.Module, parallel: TensorParallel) -> NormRule | str | None:
    """How a norm is computed, the operator that gates an MLP, or None for what runs as it is, in one process or all."""
    try:
        rule = parallel.together(lambda: _read(module))
    except (NotRecognisedError, AttributeError, TypeError, RuntimeError):  # other parts
        return None
    return rule if isinstance(rule, NormRule) or parallel.all(_gates_so(module, rule)) else None


def _gates_so(module: nn.Module, rule: str) -> bool:
    """Whether the MLP gives with the operator what it gives without. All processes that hold it call this together."""
    weight = module.down_proj.weight
    states = torch.randn(1, _PROVED_ON, weight.shape[0], generator=torch.Generator().manual_seed(0))
    states = states.to(weight.device, weight.dtype)
    try:
        return nearly_equal(_forward_by(module, rule)(states), module(states))
    except torch.OutOfMemoryError:
        raise  # in one process alone: the others wait for it inside the MLP
    except (AttributeError, TypeError, RuntimeError):  # other parts, or sizes that the kernels refuse
        return False


def _read(module: nn.Module) -> NormRule | str:
    """The rule of a norm, or the operator of an MLP as it reads."""
    if not any(True for _ in module.children()):
        return norm_rule(module)
    if not as_built(module) or not module.down_proj.weight.is_floating_point():
        raise NotRecognisedError("it has hooks, another forward, or weights that are no floats")
    return activation_of(module)


def _forward_by(module: nn.Module, rule: NormRule | str) -> Callable[[Tensor], Tensor]:
    if isinstance(rule, NormRule):
        norm = Norm(module, rule)
        return lambda states: norm(states, None)[0]

    def gated(states: Tensor) -> Tensor:
        multiply = getattr(operators(states.device, states.dtype, ANY_ROW), rule)
        if hasattr(module, "gate_up_proj"):
            return module.down_proj(multiply(*module.gate_up_proj(states).chunk(2, dim=-1)))
        return module.down_proj(multiply(module.gate_proj(states), module.up_proj(states)))

    return gated


@contextmanager
def _in_place(module: nn.Module, rule: NormRule | str | None, tile: int) -> Iterator[None]:
    """A forward from `[batch, seq_len, size]` to the same shape, by its rule and in tiles; as it is on other states."""
    name = forward_name(module)
    original = getattr(module, name)
    by_rule = original if rule is None else _forward_by(module, rule)

    @functools.wraps(original)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cast = rule is not None and hidden_states.dtype != next(module.parameters()).dtype
        if hidden_states.dim() != 3 or cast or args or kwargs or torch.is_grad_enabled():
            return original(hidden_states, *args, **kwargs)
        if isinstance(rule, NormRule) or not 0 < tile < hidden_states.shape[1]:
            return by_rule(hidden_states.contiguous())
        out = None
        for begin in range(0, hidden_states.shape[1], tile):
            part = hidden_states[:, begin : begin + tile].contiguous()
            done = by_rule(part)
            if not isinstance(done, Tensor) or done.shape != part.shape:
                return original(hidden_states)
            out = done.new_empty(hidden_states.shape) if out is None else out
            out[:, begin : begin + tile] = done
        return out

    undo = set_on_instance(module, name, forward)
    try:
        yield
    finally:
        undo()

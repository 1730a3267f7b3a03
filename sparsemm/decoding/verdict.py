"""Whether a decode step may call the decoder layers directly, asked once of every model.

`DecodeStep` takes for granted that nothing but embedding, rotary embedding, layers, norm and output matrix stands
between a token and its logits. A model that scales, caps or otherwise adds to them is found out by running its own
forward on the same token.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.cache import SparseCache
from sparsemm.decoding.fused_layer import StepRules
from sparsemm.decoding.fused_proof import prove_rules
from sparsemm.decoding.step import DecodeStep
from sparsemm.models.instances import Findings
from sparsemm.models.projections import Projections

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Verdict:
    """What is known of a model's decode steps.

    Attributes:
        layers_serve: Whether the layers alone give the logits of the model.
        rules: Of the layers that may be fused, once asked for.
    """

    layers_serve: bool
    rules: StepRules | None = None

    def rules_of(self, step: DecodeStep, projections: tuple[Projections | None, ...]) -> StepRules:
        """The rules, proved on the step's own cache, which is left as it was. No head may be masked meanwhile."""
        if self.rules is None:
            with _taken_back(step.cache):
                step.cache.begin_steps()
                self.rules = prove_rules(step, projections)
        return self.rules


_verdicts: Findings[Verdict] = Findings()


@torch.no_grad()
def verdict_on(step: DecodeStep) -> Verdict:
    """Whether the layers alone give the logits of the model for `step.token`; the cache is left as it was.

    They may differ by twice the error that the model's forward itself has in its dtype, against one of higher
    precision. The verdict is remembered until a forward, a weight or a setting of a module changes.
    """
    return _verdicts.about(step.model, [step.model], lambda: Verdict(_compare(step)))


def _compare(step: DecodeStep) -> bool:
    with _taken_back(step.cache):
        expected = step.forward_of_model()
    with _taken_back(step.cache):
        step.cache.begin_steps()
        found = step.forward_of_layers()
    parallel = step.cache.plan.parallel  # whose processes come to one verdict
    if parallel.all(torch.equal(found, expected)):
        return True
    try:
        own_error = _difference(expected, _finer_logits(step))
    except RuntimeError as error:  # weights that cannot be cast, or no memory for it
        if parallel.size > 1 and isinstance(error, torch.OutOfMemoryError):
            raise  # in the middle of a forward, where the other processes wait for this one
        logger.warning("the error of the model's own forward could not be measured: %s", error)
        own_error = 0.0
    serve = parallel.all(_difference(found, expected) <= 2 * own_error)
    if not serve:
        logger.warning(
            "%s does more between a token and its logits than its layers: every decode step runs its own forward, "
            "without a CUDA graph",
            type(step.model).__name__,
        )
    return serve


@contextlib.contextmanager
def _taken_back(cache: SparseCache) -> Iterator[None]:
    """Leave the cache as it is, whatever is fed meanwhile."""
    fed = cache.columns.count
    try:
        yield
    finally:
        cache.roll_back()
        cache.crop(fed - cache.columns.count)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _finer_logits(step: DecodeStep) -> Tensor:
    """The logits of the model's own forward in float32, or in float64 where the model is in float32."""
    finer = torch.float64 if step.model.dtype == torch.float32 else torch.float32
    twin = copy.copy(step)
    twin.cache = copy.deepcopy(step.cache)
    for layer in twin.cache.layers:
        layer.key_buffer, layer.value_buffer = layer.key_buffer.to(finer), layer.value_buffer.to(finer)
    with contextlib.ExitStack() as stack:
        for module in step.model.modules():
            stack.enter_context(_cast_while_running(module, finer))
        return twin.forward_of_model()


@contextlib.contextmanager
def _cast_while_running(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the module's own weights be of `dtype` during its forwards, one module at a time."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(*_: Any) -> None:
        for tensors in (module._parameters, module._buffers):
            held.append((tensors, dict(tensors)))
            for name, tensor in held[-1][1].items():
                if tensor is not None and tensor.is_floating_point() and not tensor.is_meta:
                    tensors[name] = tensor.to(dtype)

    def after(*_: Any) -> None:
        while held:
            tensors, originals = held.pop()
            tensors.update(originals)

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        after()

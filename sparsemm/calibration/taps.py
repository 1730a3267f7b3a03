"""Looking into a model's own attention, and standing between it and the layer that called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsemm.models.instances import forward_name, set_on_instance
from sparsemm.models.layers import ragged_layers
from sparsemm.models.projections import Projections

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""transformers' attention interface: `attend(module, query, key, value, attention_mask, **kwargs)`."""

Tap = Callable[..., tuple[Tensor, Tensor | None]]
"""`tap(attend, module, query, key, value, attention_mask, **kwargs)` in place of `attend`, the model's own: query
`[batch, num_query_heads, n, head_dim]`, key and value `[batch, num_kv_heads, cached + n, head_dim]`, after RoPE;
returns `[batch, n, num_query_heads, head_dim]`, and weights or None."""


@contextmanager
def tapped(text_model: nn.Module, tap: Tap) -> Iterator[None]:
    """While the context lasts, `tap` answers every attention call of the language model's layers with ragged rows."""
    config, layers = text_model.config, ragged_layers(text_model.config)
    own = config._attn_implementation
    projections = Projections.of(text_model.layers[0].self_attn)
    attend: Attend = projections.interface.get_interface(own, projections.eager)
    name = f"{own}_tapped_{id(text_model)}"

    def through_tap(module: nn.Module, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if module.layer_idx not in layers:
            return attend(module, *states, **kwargs)
        return tap(attend, module, *states, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, through_tap)
    # A name that the mask functions do not know would get no mask at all.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(name, None)
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(name, None)


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No gradient with respect to any weight, evaluation mode; at the end M-RoPE's `rope_deltas` are put back."""
    trained, training = [each for each in model.parameters() if each.requires_grad], model.training
    before = getattr(model.model, "rope_deltas", None)
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = before


@contextmanager
def recomputed_layers(text_model: nn.Module) -> Iterator[None]:
    """Decoder layers keep their input only, and run again when the gradient comes to them."""

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    with ExitStack() as undo:
        for layer in text_model.layers:
            name = forward_name(layer)
            undo.callback(set_on_instance(layer, name, recomputed(getattr(layer, name))))
        yield


class _PromptLayer(DynamicLayer):
    """A prompt's keys and values. What a forward adds to them is gone with the forward, so it can be run again."""

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(prompt.keys, prompt.values)
        self.keys, self.values = prompt.keys, prompt.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept = self.keys, self.values
        joined = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = kept
        return joined


def fixed_prompt(cache: DynamicCache) -> Cache:
    """A cache that holds what `cache` holds, for any number of forwards behind the same prompt."""
    return Cache(layers=[_PromptLayer(layer) for layer in cache.layers])

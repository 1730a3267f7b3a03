"""Proof that the attention layers of a model do what their `Projections` say, and nothing that the cache cannot honour.

Each layer's own forward runs on a few random columns, with a recorder in place of the attention function and of the
cache. What the recorder is handed, and what the layer makes of its answer, has to equal ours bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.errors import UnsupportedModelError
from sparsemm.models.instances import Findings, device_of
from sparsemm.models.layers import rotary_embeddings, sliding_windows
from sparsemm.models.parallel import TensorParallel, tensor_parallel_of
from sparsemm.models.projections import Projections
from sparsemm.models.recorder import EARLIER, NAME, WINDOW, Recorder
from sparsemm.models.rotation import with_rotation

_COLUMNS = 4
_LAYER_TYPES = {
    "sliding_attention": WINDOW,
    "chunked_attention": "it attends within chunks (chunked attention), which a cache of kept rows would not honour",
    "linear_attention": "it keeps a running state instead of keys and values (linear attention)",
}

_proved: Findings[tuple[Projections | None, ...]] = Findings()


def proved_projections(text_model: nn.Module) -> tuple[Projections | None, ...]:
    """The projections of every layer of a language model, proved; None for a layer with a sliding window among others.

    Such a layer keeps its own forward; of it, only that it uses its cache as transformers' own is proved.

    The verdict is remembered until a forward, a weight or a setting of an attention module changes. A layer whose
    weights are on the meta device is taken as it reads. The random state, the mode and the hooks of the model are left
    alone. The processes of a model under tensor parallelism come to one verdict.

    Raises:
        UnsupportedModelError: A layer cannot be served; names it, and what it does otherwise.
    """
    _check_layer_types(text_model)
    attentions, read = [], []
    for layer_idx, layer in enumerate(text_model.layers):
        with _layer(layer_idx, layer):
            attentions.append(_attention(layer))
            read.append(Projections.of(attentions[-1]))
    return _proved.about(text_model, attentions, lambda: _prove(text_model, attentions, read))


def _attention(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        parts = ", ".join(name for name, _ in layer.named_children())
        raise UnsupportedModelError(f"it has no self_attn; its parts are {parts}")
    return attention


@contextmanager
def _layer(layer_idx: int, layer: nn.Module) -> Iterator[None]:
    """Refusals name the layer."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"layer {layer_idx} of the language model ({type(layer).__name__}) cannot be served: {error}"
        ) from error.__cause__


def _check_layer_types(text_model: nn.Module) -> None:
    """Refuse what the configuration says of attention masks, which a layer run by itself does not show."""
    config = text_model.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and window is not None and getattr(config, "use_sliding_window", True):
        layer_types = ["sliding_attention"] * len(text_model.layers)
    apart = sliding_windows(config)
    for layer_idx, (layer, kind) in enumerate(zip(text_model.layers, layer_types or (), strict=False)):
        if kind != "full_attention" and apart[layer_idx] is None:
            with _layer(layer_idx, layer):
                raise UnsupportedModelError(_LAYER_TYPES.get(kind, f"it is of type {kind!r}").format(window or "some"))


def _prove(
    text_model: nn.Module, attentions: Sequence[nn.Module], read: Sequence[Projections]
) -> tuple[Projections | None, ...]:
    devices = [device_of(module) for module in attentions]
    apart = sliding_windows(text_model.config)
    proved = [each if window is None else None for each, window in zip(read, apart, strict=True)]
    if all(device.type == "meta" for device in devices):
        return tuple(proved)
    parallel = tensor_parallel_of(text_model)
    config = copy.deepcopy(text_model.config)
    config._attn_implementation = NAME
    with torch.no_grad(), _eval_mode(attentions):
        every_layers = _columns(text_model)
        for layer_idx, (module, device, columns) in enumerate(zip(attentions, devices, every_layers, strict=True)):
            if device.type != "meta":
                with _layer(layer_idx, text_model.layers[layer_idx]):
                    recorder = Recorder({name: _moved(each, device) for name, each in columns.items()}, parallel)
                    _check_division(module, recorder.columns["hidden_states"], parallel)
                    recorder.run(module, read[layer_idx], config)
                    parallel.together(lambda: recorder.check(layer_idx))  # noqa: B023 - called here
                    if proved[layer_idx] is not None:
                        parallel.together(recorder.check_arguments)
                        found = recorder.proved(module, read[layer_idx])
                        proved[layer_idx] = with_rotation(found, columns["position_embeddings"], *recorder.states)
    if len({projections.num_kv_heads for projections in proved if projections is not None}) > 1:
        raise UnsupportedModelError("some layers have all kv heads in every process, others a part of them")
    return tuple(proved)


def _check_division(module: nn.Module, hidden_states: Tensor, parallel: TensorParallel) -> None:
    """Refuse a layer whose heads transformers has cut through, in all processes alike."""
    config, size = module.config, parallel.size
    projections = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, heads in projections.items():
        if heads % size and hasattr(module, name):
            width = getattr(module, name)(hidden_states).shape[-1]
            if not all(whole == heads * module.head_dim for whole in parallel.collect(width)):
                raise UnsupportedModelError(
                    f"the {heads} heads of its {name} do not divide among the {size} processes that hold the model; "
                    "start a number of processes that divides them"
                )


def _columns(text_model: nn.Module) -> list[dict[str, Any]]:
    """Arguments of each layer's attention for random columns, the rotation of M-RoPE positions where the model has
    them; `position_ids` are of another place, where only what ignores them gives the same."""
    config, rotary_emb = text_model.config, getattr(text_model, "rotary_emb", None)
    hidden_states = torch.randn(1, _COLUMNS, config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden_states, position_ids = hidden_states.to(text_model.dtype), torch.tensor([[3, 1, 7, 12]])
    embeddings: list[Any] = [None] * len(text_model.layers)
    if rotary_emb is not None:
        three_axes = "mrope_section" in (getattr(config, "rope_parameters", None) or {})
        rotated = torch.stack([position_ids, position_ids.flip(1), position_ids + 5]) if three_axes else position_ids
        device = next(rotary_emb.buffers(), hidden_states).device
        try:
            embeddings = rotary_embeddings(text_model, hidden_states.to(device), rotated.to(device))
        except TypeError as error:
            raise UnsupportedModelError(
                f"the language model's rotary embedding is not one of positions alone ({error})"
            ) from error
    same = {
        "hidden_states": hidden_states,
        "attention_mask": torch.zeros(1, 1, _COLUMNS, _COLUMNS, dtype=text_model.dtype),
        "position_ids": position_ids + EARLIER,
    }
    return [{**same, "position_embeddings": each} for each in embeddings]


def _moved(value: Any, device: torch.device) -> Any:
    return tuple(each.to(device) for each in value) if isinstance(value, tuple) else value.to(device)


@contextmanager
def _eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout, whatever mode each part is in."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

"""Proof that the attention layers of a model do what their `Projections` say, and nothing that the cache cannot honour.

Each layer's own forward runs on a few random columns, with a recorder in place of the attention function and of the
cache. What the recorder is handed, and what the layer makes of its answer, has to equal ours bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.errors import UnsupportedModelError
from sparsemm.models.instances import Findings, device_of, forward_name, set_on_instance
from sparsemm.models.layers import rotary_embeddings, sliding_windows
from sparsemm.models.parallel import TensorParallel, tensor_parallel_of
from sparsemm.models.projections import Projections

_COLUMNS = 4
_EARLIER = 1 << 20  # tokens said to be cached already: shows what depends on a token's position beside the rotation
_NAME = "sparsemm_recorder"

_WINDOW = (
    "it attends through a sliding window of {} tokens, which a cache of kept rows would not honour; load the model "
    "with sliding_window=None if its prompts are shorter than that"
)
_LAYER_TYPES = {
    "sliding_attention": _WINDOW,
    "chunked_attention": "it attends within chunks (chunked attention), which a cache of kept rows would not honour",
    "linear_attention": "it keeps a running state instead of keys and values (linear attention)",
}
# What attention functions are told beside query, key, value, dropout and scaling.
_ARGUMENTS = {
    "attention_mask": "it does not attend by the mask it is given",
    "is_causal": "it attends in both directions",
    "sliding_window": _WINDOW,
    "softcap": "it caps its attention logits at {} (soft cap), which attention over kept rows does not",
    "s_aux": "it has attention sinks (a learned logit beside the keys), which attention over kept rows has not",
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
    config._attn_implementation = _NAME
    with torch.no_grad(), _eval_mode(attentions):
        every_layers = _columns(text_model)
        for layer_idx, (module, device, columns) in enumerate(zip(attentions, devices, every_layers, strict=True)):
            if device.type != "meta":
                with _layer(layer_idx, text_model.layers[layer_idx]):
                    recorder = _Recorder({name: _moved(each, device) for name, each in columns.items()}, parallel)
                    _check_division(module, recorder.columns["hidden_states"], parallel)
                    recorder.run(module, read[layer_idx], config)
                    parallel.together(lambda: recorder.check(layer_idx))  # noqa: B023 - called here
                    if proved[layer_idx] is not None:
                        parallel.together(recorder.check_arguments)
                        proved[layer_idx] = recorder.proved(module, read[layer_idx])
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
        "position_ids": position_ids + _EARLIER,
    }
    return [{**same, "position_embeddings": each} for each in embeddings]


class _Recorder:
    """Stands in for a layer's attention function and its cache, and notes what it is handed.

    Attributes:
        columns: The arguments of the layer.
        parallel: The processes that have a part of it each.
        states: Query, key and value of each call.
        arguments: What came with them.
        stored: Key, value and layer index of each update of the cache.
        answer: What it answered, `[1, columns, query heads, head_dim]` of random numbers.
        result: What the layer made of it.
    """

    def __init__(self, columns: dict[str, Any], parallel: TensorParallel) -> None:
        self.columns, self.parallel = columns, parallel
        self.states: list[dict[str, Tensor]] = []
        self.arguments: dict[str, Any] = {}
        self.stored: list[tuple[Tensor, Tensor, int]] = []
        self.answer: Tensor | None = None
        self.result: Any = None

    def run(self, module: nn.Module, projections: Projections, config: Any) -> None:
        """Call the layer's own forward as decoder layers do; `config` names the recorder as its attention function."""
        undo = set_on_instance(module, "config", config)
        projections.interface[_NAME] = self._attend
        try:
            forward = getattr(module, forward_name(module))
            self.result = forward(**self.columns, past_key_values=self)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise UnsupportedModelError(f"its forward does not run as decoder layers call it ({error})") from error
        finally:
            del projections.interface[_NAME]
            undo()

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.states.append({"query": query, "key": key, "value": value})
        self.arguments = {"attention_mask": attention_mask, **kwargs}
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        answer = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.answer = answer.to(query.device, query.dtype)
        return self.answer, None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.stored.append((key, value, layer_idx))
        return key, value

    def get_seq_length(self, *args: Any) -> int:
        return _EARLIER

    def check(self, layer_idx: int) -> None:
        """Refuse what attention over kept rows would not honour."""
        if len(self.states) != 1:
            raise UnsupportedModelError("it does not attend once, through transformers' attention interface")
        (states,) = self.states
        stored = [(id(key), id(value), index) for key, value, index in self.stored]
        if stored != [(id(states["key"]), id(states["value"]), layer_idx)]:
            raise UnsupportedModelError("it does not put the keys and values that it attends to into its cache, once")

    def check_arguments(self) -> None:
        """Refuse what came with them and attention over kept rows cannot honour."""
        for name, value in self.arguments.items():
            if not self._is_honoured(name, value):
                unknown = f"it hands {name} to its attention function, which attention over kept rows does not know"
                raise UnsupportedModelError(_ARGUMENTS.get(name, unknown).format(value))

    def _is_honoured(self, name: str, value: Any) -> bool:
        if name == "attention_mask":
            return isinstance(value, Tensor) and torch.equal(value, self.columns[name])
        return (
            value is None or name in ("dropout", "scaling", "position_ids") or (name == "is_causal" and value is True)
        )

    def proved(self, module: nn.Module, read: Projections) -> Projections:
        """The projections as read, with or without rotation, that give what was recorded."""
        scaling = self.arguments.get("scaling")
        read = dataclasses.replace(
            read,
            scaling=read.head_dim**-0.5 if scaling is None else scaling,
            num_kv_heads=self.states[0]["key"].shape[1],
        )
        differences = []
        for candidate in (read, dataclasses.replace(read, rotary=None)):
            difference = self._difference(module, candidate)
            if difference is None:
                return candidate
            differences.append(difference)
        raise UnsupportedModelError(differences[0])

    def _difference(self, module: nn.Module, projections: Projections) -> str | None:
        """What `projections` would do otherwise, in any process; all of them hear of it."""
        (theirs,) = self.states
        difference = None
        try:
            states = projections.project(module, self.columns["hidden_states"], self.columns["position_embeddings"])
        except (TypeError, ValueError, RuntimeError) as error:
            difference = f"its projections do not fit together as they read ({error})"
        else:
            pairs = zip(theirs.items(), states, strict=True)
            found = (_unlike(name, value, ours, "its projections, norms and rotary embedding")
                     for (name, value), ours in pairs)  # fmt: skip
            difference = next(filter(None, found), None)
        difference = self.parallel.first_of(difference)
        if difference is None:
            output = self.result[0] if isinstance(self.result, tuple) else self.result
            ours = projections.output(module, self.answer)
            difference = self.parallel.first_of(_unlike("output", output, ours, "o_proj"))
        return difference


def _unlike(name: str, value: Tensor, ours: Tensor, source: str) -> str | None:
    """How `value` differs from what `source` would give, if it does."""
    if value.shape != ours.shape or value.dtype != ours.dtype:
        shapes = [f"{states.dtype} {list(states.shape)}" for states in (value, ours)]
        return f"its {name} is {shapes[0]}, its projections would give {shapes[1]}"
    if torch.allclose(value, ours, rtol=0, atol=0, equal_nan=True):
        return None
    off = (value.float() - ours.float()).abs().max().item()
    return f"its {name} is not what {source} would give (off by {off:.2g})"


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

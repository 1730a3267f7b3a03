"""What stands in for the attention function and the cache of one layer, and what it says of the layer (see `proof`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.errors import UnsupportedModelError
from sparsemm.models.instances import forward_name, set_on_instance
from sparsemm.models.parallel import TensorParallel
from sparsemm.models.projections import Projections

NAME = "sparsemm_recorder"
"""Of the attention function, among transformers' own while a layer runs."""
EARLIER = 1 << 20
"""Tokens said to be cached already: shows what depends on a token's position beside the rotation."""

WINDOW = (
    "it attends through a sliding window of {} tokens, which a cache of kept rows would not honour; load the model "
    "with sliding_window=None if its prompts are shorter than that"
)
# What attention functions are told beside query, key, value, dropout and scaling.
_ARGUMENTS = {
    "attention_mask": "it does not attend by the mask it is given",
    "is_causal": "it attends in both directions",
    "sliding_window": WINDOW,
    "softcap": "it caps its attention logits at {} (soft cap), which attention over kept rows does not",
    "s_aux": "it has attention sinks (a learned logit beside the keys), which attention over kept rows has not",
}


class Recorder:
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
        """Call the layer's own forward as decoder layers do; `config` names the recorder as its attention function.

        Raises `UnsupportedModelError` where it cannot be called so.
        """
        undo = set_on_instance(module, "config", config)
        projections.interface[NAME] = self._attend
        try:
            forward = getattr(module, forward_name(module))
            self.result = forward(**self.columns, past_key_values=self)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise UnsupportedModelError(f"its forward does not run as decoder layers call it ({error})") from error
        finally:
            del projections.interface[NAME]
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
        return EARLIER

    def check(self, layer_idx: int) -> None:
        """Refuse (`UnsupportedModelError`) what attention over kept rows would not honour."""
        if len(self.states) != 1:
            raise UnsupportedModelError("it does not attend once, through transformers' attention interface")
        (states,) = self.states
        stored = [(id(key), id(value), index) for key, value, index in self.stored]
        if stored != [(id(states["key"]), id(states["value"]), layer_idx)]:
            raise UnsupportedModelError("it does not put the keys and values that it attends to into its cache, once")

    def check_arguments(self) -> None:
        """Refuse (`UnsupportedModelError`) what came with them and attention over kept rows cannot honour."""
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
        """The projections as read, with or without rotation, that give what was recorded.

        Raises `UnsupportedModelError` where neither does; says by how much.
        """
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

"""Greedy generation with a clock in it, and image features that are computed once."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList


class StepClock(StoppingCriteria):
    """Notes the time at which each token is chosen; never stops a generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.now()
        self.ticks: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ticks.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def prefill_seconds(self) -> float:
        return self.ticks[0] - self.start

    @property
    def decode_seconds(self) -> float:
        return self.ticks[-1] - self.ticks[0]

    @property
    def decode_steps(self) -> int:
        return len(self.ticks) - 1


def generate_greedy(
    model: nn.Module, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any
) -> tuple[Tensor, StepClock]:
    """Greedy continuation `[batch, new tokens]`, prompts cut off, and when each token came.

    `options` go on to `model.generate`, a `streamer` for instance.
    """
    clock = StepClock(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # a checkpoint's settings of sampling: without effect here, but warned about
        top_p=None,
        top_k=None,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return output[:, inputs["input_ids"].shape[1] :], clock


@contextmanager
def remember_image_features(model: nn.Module, *, capacity: int) -> Iterator[None]:
    """Encode each `pixel_values` tensor once while the context lasts; the vision tower does not depend on the cache.

    At most `capacity` results are held. Only the instance is touched, and put back at the end.
    """
    inner = model.model
    original = inner.get_image_features
    on_instance = "get_image_features" in vars(inner)
    known: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    @functools.wraps(original)  # transformers reads the names of its parameters
    def get_image_features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The tensor is held beside its features, so that no other one can come to lie at its address.
        key = (pixel_values.data_ptr(), tuple(pixel_values.shape), pixel_values.dtype)
        if key not in known:
            while len(known) >= capacity:
                known.pop(next(iter(known)))
            known[key] = (pixel_values, original(pixel_values, *args, **kwargs))
        return known[key][1]

    inner.get_image_features = get_image_features
    try:
        yield
    finally:
        if on_instance:
            inner.get_image_features = original
        else:
            del inner.get_image_features

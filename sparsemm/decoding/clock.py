"""When each token was chosen."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Clock:
    """Time between marks, on the device's own clock where there is one; nothing waits before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.cuda:
            return [end - begin for begin, end in pairs]
        self.marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


class StepClock(StoppingCriteria):
    """A clock for the loop of transformers: marks each token, never stops a generation."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.clock.mark()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

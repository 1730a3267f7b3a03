"""Counting what a piece of code asks of the device, whether or not there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS_BACK = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal")
"""Operators whose result the host waits for."""

DATA_DEPENDENT = (
    *("aten.nonzero", "aten.nonzero_static", "aten.masked_select", "aten._unique2", "aten.unique_dim"),
    *("aten.unique_consecutive", "aten.repeat_interleave.Tensor", "aten.bincount"),
)
"""Operators whose output has a shape that depends on values, so that they cannot be in a CUDA graph."""


@dataclass
class OperatorCount:
    """Operators that one run dispatched.

    Attributes:
        names: Times each was dispatched, views included.
        launches: Those that launch work: all but views and bare allocations.
        allocated_bytes: Bytes of their new outputs.
        trace: (name, shapes of new outputs) in order: two steps of equal work have equal traces.
    """

    names: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    allocated_bytes: int = 0
    trace: list[tuple[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def offending(self) -> list[str]:
        """Operators that read back or have data-dependent shapes: none may be in a captured step."""
        found = []
        for name in self.names:
            if any(name == bad or name.startswith((bad + ".", bad + " ")) for bad in (*READS_BACK, *DATA_DEPENDENT)):
                found.append(name)
        return sorted(found)


class _Counting(TorchDispatchMode):
    def __init__(self, count: OperatorCount) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        outputs = [each for each in results if isinstance(each, torch.Tensor)]
        name = str(func)
        mask_indices = args[1] if name == "aten.index.Tensor" else ()
        if any(each is not None and each.dtype == torch.bool for each in mask_indices):
            name = "aten.masked_select (indexing by a mask)"
        returns = [result.alias_info for result in func._schema.returns if result.alias_info is not None]
        new = [] if returns else outputs
        self.count.names[name] += 1
        self.count.trace.append((name, tuple(tuple(each.shape) for each in new)))
        self.count.allocated_bytes += sum(each.nbytes for each in new)
        if all(alias.is_write for alias in returns) and name not in _ALLOCATIONS:
            self.count.launches += 1
        return out


_ALLOCATIONS = (
    *("aten.empty.memory_format", "aten.empty_like.default", "aten.empty_strided.default"),
    *("aten.new_empty.default", "aten.new_empty_strided.default"),
)


def count_operators(run: Callable[[], Any]) -> OperatorCount:
    """Run it once and count the operators it dispatches (those inside compiled kernels are part of theirs)."""
    count = OperatorCount()
    with _Counting(count):
        run()
    return count


def count_kernels(run: Callable[[], Any], device: torch.device) -> int | None:
    """Run it once and count the kernels and copies that a GPU executes; None for a CPU."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in record.events())

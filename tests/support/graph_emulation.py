"""A CUDA graph's contract without CUDA: a capture records operators on fixed tensors, a replay runs just those again.

No Python of the captured step runs in a replay, and nothing but tensors carries over: a step that leans on host state,
or on tensors that are replaced, gives wrong results here as it would on a GPU. Reading back is an error.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemm.bench.operators import count_operators


class _Recorder(TorchDispatchMode):
    """Runs and records operators; `undo` puts back what they changed in tensors that existed before."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}
        self.fresh = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not all(map(_is_plain, types)):
            return NotImplemented  # a DTensor, say, which is taken apart first
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.fresh and storage.data_ptr() not in self.before:
                    self.before[storage.data_ptr()] = (storage, storage.clone())
        out = func(*args, **kwargs)
        results = out if isinstance(out, (tuple, list)) else (out,)
        outputs = [each for each in results if isinstance(each, torch.Tensor)]
        if not all(_is_plain(type(each)) for each in outputs):
            return out  # wrapped, which is no work
        aliases = [result.alias_info for result in func._schema.returns if result.alias_info is not None]
        if not aliases:
            self.fresh |= {each.untyped_storage().data_ptr() for each in outputs}
        if all(alias.is_write for alias in aliases):  # a view of a fixed tensor stays what it is
            self.calls.append((func, args, kwargs, [] if aliases else outputs))
        return out

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)


def _is_plain(kind):
    return kind in (torch.Tensor, torch.nn.Parameter)


def _wait_for(func, results):
    """On a GPU a collective is one more kernel of the graph; on the CPU it is waited for."""
    if func.namespace == "_c10d_functional" and "wait" not in func.name():
        torch.ops._c10d_functional.wait_tensor(results[0])
    elif func.namespace == "c10d":
        results[-1].wait()


class EmulatedGraphs:
    """Stands in for `sparsemm.decoding.graph.CudaGraphs`."""

    def __init__(self, device):
        self.replays = 0

    def warm_up(self, body):
        body()

    def capture(self, body):
        recorder, drawn = _Recorder(), torch.get_rng_state()
        with recorder:
            body()
        recorder.undo()  # a capture changes nothing

        @torch.inference_mode()  # a graph knows nothing of autograd; results of the capture may be written into
        def replay():
            self.replays += 1
            for func, args, kwargs, outputs in recorder.calls:
                again = func(*args, **kwargs)
                again = again if isinstance(again, (tuple, list)) else (again,)
                _wait_for(func, again)
                for old, new in zip(outputs, again, strict=False):
                    old.copy_(new)

        found = count_operators(replay).offending()
        recorder.undo()
        torch.set_rng_state(drawn)  # as a generator that is captured: only replays draw
        self.replays -= 1
        assert not found, f"a captured step may not use {found}"
        return replay

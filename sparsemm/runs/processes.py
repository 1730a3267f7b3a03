"""Several processes on one job, as `accelerate launch` starts them: who am I, how many are we, wait for the others.

Processes that hold one model together (tensor parallelism) count as one here: they do the same work.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

from sparsemm.models.parallel import ALONE, TensorParallel, joined, launched

_PATIENCE = datetime.timedelta(days=7)
"""Shares of a long job end hours apart; torch's own limit is half an hour or less."""


@dataclass(frozen=True)
class Workers:
    """This process among those of its job.

    Attributes:
        rank: Number of this process, 0 to `count` - 1.
        count: Number of processes.
        device: "cuda:<local rank>" where each process has a GPU of its own, else None.
        parallel: The processes that do this one's work with it.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    parallel: TensorParallel = ALONE

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all have in common."""
        return self.rank == 0 and self.writes

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes what its work gives."""
        return self.parallel.first

    def owns(self, index: int) -> bool:
        """Whether item `index` falls to this process: one in `count`, whoever does the others."""
        return index % self.count == self.rank

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.parallel.size > 1:
            import torch.distributed

            torch.distributed.barrier()
        elif self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def workers() -> Workers:
    """This process as the launcher (`accelerate launch`, `torchrun`) describes it; alone where there is none."""
    count = launched()
    if count <= 1:
        return Workers()
    parallel = joined()
    if parallel.size > 1:
        return Workers(int(os.environ["RANK"]) // parallel.size, count // parallel.size, parallel=parallel)
    import torch
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    state = PartialState(cpu=not on_gpu, timeout=_PATIENCE)
    return Workers(state.process_index, state.num_processes, str(state.device) if on_gpu else None)

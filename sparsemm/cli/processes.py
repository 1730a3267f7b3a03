"""A command in several processes that hold one model together: started by torchrun's launcher, ended together."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a process of torchrun leaves what ended it
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "recvValue")  # in errors of torch.distributed

_together = False  # whether this is one of several processes on the running command


def run_together(count: int) -> bool:
    """Have the running command done by `count` processes: whether this is one of them, else they have done it.

    Under a launcher, this process joins the others; of those that hold one model the first prints. Otherwise the
    processes are started here, with the arguments of this one, and whichever fails ends all.

    Raises `typer.Exit` with their status where they failed, after one message on standard error.
    """
    global _together
    from sparsemm.models.parallel import join, launched

    if launched() > 1:
        _together = True
        join(count)
        if int(os.environ["RANK"]) % count:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        return True
    status = _launch(count, ["-m", "sparsemm", *sys.argv[1:]])
    if status:
        raise typer.Exit(status)
    return False


def leave_message(error: Exception, line: str) -> bool:
    """Leave the reason that ends this process to the launcher; False where this is no process of several."""
    path = os.environ.get(_ERROR_FILE)
    if not _together or path is None:
        return False
    if isinstance(error, RuntimeError) and any(text in line for text in _LOST):
        line = f"another process that holds the model has gone ({line})"
    about = {"message": f"error: {line}", "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
    Path(path).write_text(json.dumps({"message": about}))
    return True


def _launch(count: int, arguments: Sequence[str]) -> int:
    """Run Python with `arguments` in `count` processes; their status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # one message is ours
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _report(error.failures)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + stopped.sigval
    return 0


def _report(failures: dict[int, Any]) -> int:
    """Say in one line which process ended the others, and why; its status."""
    killed = [each for each in failures.values() if each.exitcode < 0 and each.exitcode != -signal.SIGTERM]
    told = [each for each in failures.values() if each.exitcode > 0]
    first = min(killed or told or failures.values(), key=lambda each: (each.timestamp, each.local_rank))
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        typer.echo(
            f"error: process {first.local_rank} of those that hold the model was ended by {name}; the others were "
            "stopped, and what was finished is kept",
            err=True,
        )
        return 1
    message = first.error_file_data.get("message") if isinstance(first.error_file_data, dict) else None
    if isinstance(message, dict):
        typer.echo(message["message"], err=True)
    return first.exitcode

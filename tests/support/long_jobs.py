"""Programs of tests/support that work through pages: killed and started again, or shared by two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

SUPPORT = Path(__file__).resolve().parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def run_here(job: ModuleType, output: Path) -> None:
    """Let the job run in this process, by one thread as in a program of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            job.run(str(output))
    finally:
        torch.set_num_threads(threads)


def killed_and_resumed(job: ModuleType, output: Path, journal: Path) -> None:
    """Kill the program once its journal holds two pages, look at what it left, and let this process end it."""
    process = subprocess.Popen([sys.executable, job.__file__, str(output), "0.5"], env=ENVIRONMENT)
    try:
        while _lines(journal) < 3 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert 3 <= _lines(journal) < 1 + job.PAGES and not output.exists()
    before = journal.read_bytes()
    run_here(job, output)
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def shared_by_two(job: ModuleType, output: Path) -> str:
    """What the program prints under `accelerate launch` with two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launcher, job.__file__, str(output), "0"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def same_files(*pairs: tuple[Path, Path]) -> None:
    """Each file equals the other of its pair, and nothing else lies beside them."""
    for path, expected in pairs:
        assert path.read_bytes() == expected.read_bytes()
    assert sorted(path for path, _ in pairs) == sorted(pairs[0][0].parent.iterdir())


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0

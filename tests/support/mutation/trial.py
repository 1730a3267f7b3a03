"""Tests against one changed file, in a copy of the tree that nobody else looks at."""

from __future__ import annotations

import compileall
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 8 << 30  # bytes of address space that a mutant may take beyond what it starts with


def copy_tree(root: Path, target: Path) -> None:
    """Everything that git knows or would take, and the compiled kernels."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    names = [Path(name) for name in listing.stdout.decode().split("\0") if name]
    kernels = [path.relative_to(root) for path in root.glob("sparsemm/ops/*.so")]
    for name in filter(lambda name: (root / name).is_file(), [*names, *kernels]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)


class Bench:
    """One process's own copy of the tree, and the modules that every trial imports."""

    def __init__(self, pristine: Path, folder: Path, modules: list[str]) -> None:
        self.pristine = pristine
        self.tree = folder / f"tree-{os.getpid()}"
        shutil.copytree(pristine, self.tree)
        os.environ.update(
            PYTHONPATH=os.pathsep.join(map(str, (self.tree, self.tree / "lmms-eval", self.tree / "tests" / "support"))),
            TMPDIR=str(folder),
            OMP_NUM_THREADS="1",
            MKL_NUM_THREADS="1",
            CUDA_VISIBLE_DEVICES="",
        )
        sys.dont_write_bytecode = False
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        compileall.compile_dir(self.tree / "sparsemm", quiet=2)
        for module in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)

    def clean_run(self, room_tests: list[str], files: list[str]) -> dict[str, Any]:
        """What `Record` notes, `modules`: what was imported meanwhile, and the `output` of pytest."""

        def run() -> dict[str, Any]:
            from mutation.plugin import Record

            record = Record(self.tree, files)
            self._pytest(room_tests, record)
            foreign = [
                name
                for name, module in sys.modules.items()
                if (place := getattr(module, "__file__", None)) and not Path(place).is_relative_to(self.tree)
            ]
            return {**record.result(), "modules": [name for name in foreign if not name.startswith("mutation")]}

        _, result, output = self._forked(run, limit=3600)
        return {**(result or {"failed": ["the whole run"]}), "output": output}

    def try_mutant(self, path: str, mutated: str, tests: list[str], seconds: dict[str, float]) -> dict[str, Any]:
        """`outcome`: "caught", "survived" or "broken" (the run itself), `by`: the test or the signal, `output`."""
        changed = self.tree / path
        changed.write_text(mutated)
        os.utime(changed, (0, 0))  # no compiled file is of that time

        def run() -> dict[str, Any]:
            from mutation.plugin import Choice

            choice = Choice(tests, seconds)
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
            code = self._pytest(["-x", *dict.fromkeys(test.split("::")[0] for test in tests)], choice)
            return {"code": code, "by": choice.caught_by}

        try:
            status, result, output = self._forked(run, limit=60 + 10 * sum(seconds[test] for test in tests))
        finally:
            self._restore()
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return {"outcome": "caught", "by": "time" if name in ("SIGALRM", "SIGKILL") else name, "output": output}
        code = (result or {"code": 3})["code"]
        outcome = {0: "survived", 1: "caught", 2: "caught"}.get(code, "broken")
        return {"outcome": outcome, "by": (result or {}).get("by") or "collection", "output": output}

    def _pytest(self, arguments: list[str], plugin: object) -> int:
        os.chdir(self.tree)
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        import pytest

        code = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=[plugin]))
        place = getattr(sys.modules.get("sparsemm"), "__file__", None)
        if place is not None and not Path(place).is_relative_to(self.tree):
            raise RuntimeError(f"the tests imported {place}, which is not in the copy")
        return code

    def _forked(self, run: Callable[[], dict[str, Any]], limit: float) -> tuple[int, dict[str, Any] | None, str]:
        """Wait status, result and output of `run` in a child process."""
        log, answer = self.tree.with_suffix(".log"), self.tree.with_suffix(".json")
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                answer.write_text(json.dumps(run()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        deadline = time.monotonic() + limit
        try:
            while not (waited := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    os.killpg(child, signal.SIGKILL)
                time.sleep(0.05)
        finally:  # of an interrupted run, too: the child has a group of its own, with what its tests start in it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        result = json.loads(answer.read_text()) if answer.exists() else None
        return waited[1], result, log.read_text(errors="replace") if log.exists() else ""

    def _restore(self) -> None:
        """Undo the change, and whatever the mutant wrote over."""
        for source in self.pristine.rglob("*"):
            if source.is_file() and "__pycache__" not in source.parts:
                target, wanted = self.tree / source.relative_to(self.pristine), source.stat()
                found = target.stat() if target.exists() else None
                if found is None or (found.st_mtime_ns, found.st_size) != (wanted.st_mtime_ns, wanted.st_size):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, target)


_bench: Bench


def open_bench(pristine: Path, folder: Path, modules: list[str]) -> None:
    """Make this process's bench; the other two functions use it."""
    global _bench
    _bench = Bench(pristine, folder, modules)


def clean_run(tests: list[str], files: list[str]) -> dict[str, Any]:
    return _bench.clean_run(tests, files)


def try_mutant(path: str, mutated: str, tests: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    return _bench.try_mutant(path, mutated, tests, seconds)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

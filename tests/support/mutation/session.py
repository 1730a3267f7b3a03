"""Drawn mutants tried one after another, those without a result only."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from mutation.draw import Mutant, Source, draw, statement_lines
from mutation.trial import clean_run, copy_tree, open_bench, try_mutant

ELSEWHERE = ("tests/ops/test_kernels_emulated.py", "tests/ops/test_planted_faults.py", "tests/test_mutants.py")
"""Tests that compile csrc/ for minutes, and those of this package: what is mutated is not what they look at."""


TESTED_ELSEWHERE = {"models": ("tests/decoding/test_fused.py",)}
"""Tests of a room that stand elsewhere, because they need rooms above it."""

IN_PROCESSES = {"tests/test_tensor_parallel.py": ("sparsemm/models/parallel.py",)}
"""Tests of the spine, run for every room, that start processes: what is executed there is not seen. And the files that
are executed there above all."""

_IMPORTED = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Room:
    """Files that are mutated, and the tests that are to catch it."""

    name: str
    root: Path

    def _list(self, folder: str, pattern: str) -> list[str]:
        place = self.root / folder if self.name == "spine" else self.root / folder / self.name
        return sorted(path.relative_to(self.root).as_posix() for path in place.glob(pattern))

    @property
    def files(self) -> list[str]:
        return self._list("sparsemm", "*.py")

    @property
    def tests(self) -> list[str]:
        own = [path for path in self._list("tests", "test_*.py") if path not in ELSEWHERE]
        return own + [path for path in TESTED_ELSEWHERE.get(self.name, ()) if (self.root / path).exists()]

    @property
    def digest(self) -> str:
        """Of the files, their tests and the helpers these import: results of the same digest need no second run."""
        read = [(self.root / name).read_text() for name in [*self.files, *self.tests]]
        helpers = {path.stem: path.read_text() for path in self.root.glob("tests/support/*.py")}
        for text in read:  # grows meanwhile: helpers import helpers
            read += [helpers.pop(name) for name in _IMPORTED.findall(text) if name in helpers]
        return hashlib.sha256("".join(read).encode()).hexdigest()[:16]


PATIENCE = 60.0
"""Seconds of tests, by the clean run, that are tried against a mutant."""


def chosen_tests(mutant: Mutant, source: Source, record: dict[str, Any], caught: Counter[str]) -> list[str]:
    """The tests that execute the changed statement, as many as `PATIENCE` allows.

    Those that caught others in the same file come first, then fast files. What runs at import is seen by every test
    that executes anything in the file; what none is seen to execute may run in processes that tests start.
    """
    lines, seconds = record["lines"].get(mutant.path, {}), record["seconds"]
    statement = source.statement_at(mutant.spec.start_pos)
    found = {test for line in statement_lines(statement) for test in lines.get(str(line), [])}
    if "" in found or not source.function_at(statement):
        found = {test for tests in lines.values() for test in tests} - {""} or set(seconds)
    found |= {test for test, files in IN_PROCESSES.items() if mutant.path in files or not found}
    of_file: Counter[str] = Counter()
    for test in seconds:
        of_file[test.split("::")[0]] += seconds[test]
    tests = [test for test in seconds if test in found or test.split("::")[0] in found]
    tests.sort(key=lambda test: (-caught[test], of_file[test.split("::")[0]], seconds[test]))
    spent = itertools.accumulate(seconds[test] for test in tests)
    return [test for test, until in zip(tests, spent, strict=True) if until <= PATIENCE] or tests[:1]


def allowed_seconds(tests: list[str], seconds: dict[str, float]) -> dict[str, float]:
    """Of each test the longest that any of its file took: of those chosen, another one may set the file up."""
    longest: Counter[str] = Counter()
    for test, spent in seconds.items():
        longest[test.split("::")[0]] = max(spent, longest[test.split("::")[0]])
    return {test: longest[test.split("::")[0]] for test in tests}


class Session:
    """Results in `folder`: session.sqlite, which cosmic-ray's own reports read, and what the clean runs showed."""

    def __init__(self, root: Path, rooms: Iterable[str], folder: Path, workers: int) -> None:
        self.root = root
        self.rooms = [Room(name, root) for name in rooms]
        self.folder = folder
        self.workers = workers
        self.room_of = {file: room for room in self.rooms for file in room.files}
        self.digests = {room.name: room.digest for room in self.rooms}  # the tree may be edited meanwhile
        self.sources = {file: Source(root, file) for file in self.room_of}
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, count: int, seed: int) -> list[tuple[Mutant, dict[str, Any]]]:
        """Every mutant with its result; what was caught before, or survived the same tests, is not run again."""
        mutants = draw(self.root, self.room_of, count, seed)
        with (
            use_db(self.folder / "session.sqlite", WorkDB.Mode.create) as database,
            tempfile.TemporaryDirectory() as tmp,
        ):
            known = {item.job_id for item in database.work_items}
            database.add_work_items(WorkItem.single(one.key, one.spec) for one in mutants if one.key not in known)
            results = {job: json.loads(result.output) for job, result in database.results}
            open_ = [one for one in mutants if not self._settled(one, results.get(one.key))]
            if open_:
                pristine = Path(tmp) / "pristine"
                copy_tree(self.root, pristine)
                records = self._records(pristine, Path(tmp))
                for mutant, result in self._tried(open_, records, results, pristine, Path(tmp)):
                    results[mutant.key] = result
                    database.set_result(mutant.key, self._stored(mutant, result))
        return [(one, results[one.key]) for one in mutants]

    def _settled(self, mutant: Mutant, result: dict[str, Any] | None) -> bool:
        if result is None or result["outcome"] == "broken":
            return False
        return result["outcome"] == "caught" or result["seen"] == self.digests[self.room_of[mutant.path].name]

    def _stored(self, mutant: Mutant, result: dict[str, Any]) -> WorkResult:
        outcome = {"caught": TestOutcome.KILLED, "survived": TestOutcome.SURVIVED}.get(
            result["outcome"], TestOutcome.INCOMPETENT
        )
        was, now = mutant.change(self.sources[mutant.path].text)
        return WorkResult(WorkerOutcome.NORMAL, json.dumps(result), outcome, f"-{was}\n+{now}")

    def _pool(self, *arguments: Any) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.workers, get_context("spawn"), open_bench, arguments)

    def _records(self, pristine: Path, tmp: Path) -> dict[str, dict[str, Any]]:
        """Of each room what its clean run showed, kept for as long as its files stay the same."""
        path = self.folder / "clean_runs.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        records = {
            room.name: kept[room.name]
            for room in self.rooms
            if kept.get(room.name, {}).get("seen") == self.digests[room.name]
        }
        wanted = [room for room in self.rooms if room.name not in records]
        with self._pool(pristine, tmp, []) as pool:
            runs = {pool.submit(clean_run, room.tests, room.files): room for room in wanted}
            while runs:
                for done in wait(runs, return_when=FIRST_COMPLETED).done:
                    room, record = runs.pop(done), done.result()
                    if record["failed"]:
                        sys.exit(f"{room.name}: {record['failed']} failed without a mutant\n{record['output'][-4000:]}")
                    records[room.name] = {**record, "seen": self.digests[room.name]}
                    path.write_text(json.dumps({**kept, **records}))
                    _say(f"{room.name}: {len(record['seconds'])} tests in {sum(record['seconds'].values()):.0f} s")
        return records

    def _tried(
        self, mutants: list[Mutant], records: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]],
        pristine: Path, tmp: Path,
    ) -> Iterable[tuple[Mutant, dict[str, Any]]]:  # fmt: skip
        caught: dict[str, Counter[str]] = {file: Counter() for file in self.room_of}
        for key, result in results.items():
            caught.get(key.split(":")[0], Counter())[result["by"]] += result["outcome"] == "caught"
        apart = {
            test: spent
            for record in records.values()
            for test, spent in record["seconds"].items()
            if test.split("::")[0] in IN_PROCESSES
        }
        modules = sorted(set().union(*(record["modules"] for record in records.values())))
        waiting, running = list(reversed(mutants)), {}
        with self._pool(pristine, tmp, modules) as pool:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    mutant = waiting.pop()
                    room = self.room_of[mutant.path]
                    record = {**records[room.name], "seconds": records[room.name]["seconds"] | apart}
                    tests = chosen_tests(mutant, self.sources[mutant.path], record, caught[mutant.path])
                    seconds = allowed_seconds(tests, record["seconds"])
                    if tests:
                        job = pool.submit(try_mutant, mutant.path, mutant.mutated, tests, seconds)
                        running[job] = mutant, room, len(tests), time.monotonic()
                    else:
                        yield mutant, {"outcome": "survived", "by": None, "tests": 0, "seen": self.digests[room.name]}
                for done in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    mutant, room, count, began = running.pop(done)
                    result = {**done.result(), "tests": count, "seen": self.digests[room.name]}
                    result["output"] = result["output"][-2000:]
                    caught[mutant.path][result["by"]] += result["outcome"] == "caught"
                    left = len(waiting) + len(running)
                    _say(f"{left:4} left  {time.monotonic() - began:5.0f} s  {result['outcome']:8}  {mutant.path}")
                    yield mutant, result


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

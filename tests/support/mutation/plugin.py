"""What pytest is told in a clean run (which test executes which line, for how long) and against a mutant."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


class Record:
    """Notes, while the tests run, the lines of `files` that each executes.

    A line that runs while a test is set up counts for all tests of its file: they may share what was made there.
    """

    def __init__(self, root: Path, files: list[str]) -> None:
        from coverage import Coverage

        self.root = root
        self.coverage = Coverage(data_file=None, include=[str(root / file) for file in files], config_file=False)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Any:
        self.coverage.start()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid.split("::")[0])
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def result(self) -> dict[str, Any]:
        """`lines`: file -> line -> tests, or files of tests; `seconds` of each test; those that `failed`."""
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            Path(file).relative_to(self.root).as_posix(): {
                str(line): sorted(filter(None, contexts)) for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        return {"lines": lines, "seconds": dict(self.seconds), "failed": self.failed}


class Choice:
    """Runs the chosen tests in the given order; the process ends where one takes much longer than it should."""

    def __init__(self, tests: list[str], seconds: dict[str, float]) -> None:
        self.place = {test: index for index, test in enumerate(tests)}
        self.seconds = seconds
        self.caught_by: str | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda it: self.place[it.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        signal.alarm(int(20 + 10 * self.seconds[item.nodeid]))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.caught_by = report.nodeid

    def pytest_sessionstart(self) -> None:
        signal.alarm(120)  # collecting imports the changed file

"""Median, quartiles and noise by hand; result files that replace what is noisy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsemm.errors import DataError
from sparsemm.runs.results import Run, RunFile
from sparsemm.runs.spread import is_noisy, show_spread, spread_of


def test_quartiles_by_hand() -> None:
    assert spread_of([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0, "count": 5}
    assert spread_of([1.0, 2.0]) == {"median": 1.5, "q25": 1.25, "q75": 1.75, "count": 2}
    assert spread_of([7.0]) == {"median": 7.0, "q25": 7.0, "q75": 7.0, "count": 1}


def test_a_spread_of_more_than_half_the_value_is_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm.runs.spread.NOISY", 0.5)
    tight, wide = {"median": 2.0, "q25": 1.5, "q75": 2.5}, {"median": 2.0, "q25": 1.5, "q75": 2.51}
    assert not is_noisy([tight, None]) and is_noisy([tight, wide])
    assert show_spread(tight) == "2.00 (1.50–2.50)" and show_spread(wide, 1, 10) == "20.0 (15.0–25.1) noisy"
    assert show_spread(None) == ""


@dataclass(frozen=True)
class Timed(Run):
    name: str
    spread: dict[str, float]
    note: str = ""

    @property
    def key(self) -> tuple[str]:
        return (self.name,)

    @property
    def noisy(self) -> bool:
        return is_noisy([self.spread])


class TimedResults(RunFile[Timed]):
    FORMAT, SUBJECT, RUN = "timed", "a test", Timed


def test_what_is_noisy_is_missing_until_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm.runs.spread.NOISY", 0.5)
    path = tmp_path / "timed.json"
    results = TimedResults.open(path, {"a": 1})
    results.add(Timed("first", spread_of([1.0, 9.0])))
    results.add(Timed("second", spread_of([1.0, 1.1])))
    again = TimedResults.open(path, {"a": 1})
    assert again.missing([("first",), ("second",), ("third",)]) == [("first",), ("third",)]
    again.add(Timed("first", spread_of([2.0, 2.1]), "calm"))
    stored = TimedResults.load(path)
    assert [(run.name, run.note) for run in stored.runs] == [("first", "calm"), ("second", "")]
    assert stored.missing([("first",), ("second",)]) == []
    with pytest.raises(DataError, match="a: 1 there, 2 here"):
        TimedResults.open(path, {"a": 2})
    with pytest.raises(DataError, match="spread"):
        Timed.from_dict({"name": "first"})

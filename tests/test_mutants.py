"""The mutation tester on a project of one file: what it plants, what it runs, and what it does a second time."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")
from mutation import session
from mutation.draw import Source, draw
from mutation.session import Session, allowed_seconds, chosen_tests

ROOT = Path(__file__).resolve().parents[1]
CODE = '''
"""Text with 1 + 1."""
LIMIT = 3


def cut(n: int | None, *, most: int = 9) -> "int | None":
    if n is None:
        raise ValueError(f"{1 - 1} is missing")
    return n - 1 if n >= LIMIT else n


def untouched(n):
    return n + 1
'''
TESTS = """
import pytest
from sparsemm.methods.toy import LIMIT, cut

def test_small_and_large():
    assert LIMIT == 3 and cut(1) == 1 and cut(10) == 9

def test_missing():
    with pytest.raises(ValueError):
        cut(None)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "sparsemm/__init__.py": "",
        "sparsemm/methods/toy.py": CODE,
        "tests/methods/test_toy.py": TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path / "project"], check=True)
    return tmp_path / "project"


def test_every_mutant_changes_what_runs_and_seeds_draw_others(project: Path) -> None:
    path = "sparsemm/methods/toy.py"
    everything = draw(project, [path], 100, 0)
    changes = {mutant.change(CODE) for mutant in everything}
    assert {was for was, _ in changes} == {
        "LIMIT = 3", "def cut(n: int | None, *, most: int = 9) -> \"int | None\":", "if n is None:",
        "return n - 1 if n >= LIMIT else n", "return n + 1",
    }  # fmt: skip
    assert all("int | None" in now for was, now in changes if was.startswith("def"))
    some = [{mutant.key for mutant in draw(project, [path], 4, seed)} for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and len(some[0]) == 4
    source = Source(project, path)
    assert not source.function_at(source.statement_at((3, 8))) and source.function_at(source.statement_at((9, 14)))


def test_survivors_are_found_and_tried_again_only_with_other_tests(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes() -> dict[tuple[str, str], tuple[str, int]]:
        session = Session(project, ["methods"], tmp_path / "session", workers=1)
        return {mutant.change(CODE): (result["outcome"], result["tests"]) for mutant, result in session.run(100, 0)}

    before = {path: path.read_bytes() for path in project.rglob("*.py")}
    found = outcomes()
    line = "return n - 1 if n >= LIMIT else n"
    edge = {line.replace(">=", ">"), line.replace(">=", "<")} & {now for _, now in found}
    assert len(edge) == 1 and ("return n + 1", "return n - 1") in found
    assert found["return n + 1", "return n - 1"] == ("survived", 0), "no test executes it"
    assert found[line, edge.copy().pop()][0] == ("survived" if ">" in edge.copy().pop() else "caught")
    assert found[line, line.replace("n - 1", "n + 1")] == ("caught", 1)
    assert found["if n is None:", "if n is not None:"][0] == "caught"
    assert {path: path.read_bytes() for path in project.rglob("*.py")} == before

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_pool", None)  # nothing is run
        assert outcomes() == found
    tests = project / "tests/methods/test_toy.py"
    tests.write_text(TESTS + "\ndef test_edge():\n    assert cut(3) == 2\n")
    tried: list[tuple[str, str]] = []
    original = Session._tried
    monkeypatch.setattr(
        Session, "_tried", lambda self, mutants, *rest: (tried.extend(mutants), original(self, mutants, *rest))[1]
    )
    again = outcomes()
    assert {mutant.change(CODE) for mutant in tried} == {
        key for key, (outcome, _) in found.items() if outcome != "caught"
    }
    assert all(outcome == "caught" for (was, _), (outcome, _) in again.items() if was == line)


def test_what_runs_in_other_processes_is_tried_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time that its file takes: of the chosen tests another one may be the first, and set it up."""
    path, apart = "sparsemm/methods/toy.py", "tests/test_apart.py"
    seconds = {"a.py::one": 1.0, f"{apart}::two": 30.0, f"{apart}::three": 0.0}
    record = {"lines": {path: {"7": ["a.py::one"], "8": ["a.py::one"]}}, "seconds": seconds}
    mutants = {mutant.change(CODE)[0]: mutant for mutant in draw(project, [path], 100, 0)}

    def chosen(was: str) -> list[str]:
        return chosen_tests(mutants[was], Source(project, path), record, Counter())

    monkeypatch.setattr(session, "IN_PROCESSES", {apart: ()})
    assert chosen("return n + 1") == [f"{apart}::three", f"{apart}::two"], "nothing here is seen to execute it"
    assert chosen("if n is None:") == ["a.py::one"]
    monkeypatch.setattr(session, "IN_PROCESSES", {apart: (path,)})
    assert chosen("if n is None:") == ["a.py::one", f"{apart}::three", f"{apart}::two"]
    assert allowed_seconds(["a.py::one", f"{apart}::three"], seconds) == {"a.py::one": 1.0, f"{apart}::three": 30.0}


def test_listed_equivalents_are_of_this_tree() -> None:
    listed = json.loads((ROOT / "tests" / "mutants.json").read_text())
    for entry in listed["equivalent"]:
        assert set(entry) == {"file", "was", "now", "reason"} and len(entry["reason"]) > 20, entry
        lines = [line.strip() for line in (ROOT / entry["file"]).read_text().splitlines()]
        assert set(entry["was"].split("\n")) <= set(lines), f"{entry['file']} holds no line {entry['was']!r}"
    for drawn in listed["draws"]:
        counts = [drawn[name] for name in ("caught", "survived", "equivalent")]
        assert sum(counts) == drawn["tried"] and len(drawn["survivors"]) == drawn["survived"]
        assert all(set(each) == {"file", "now", "what became of it"} for each in drawn["survivors"])

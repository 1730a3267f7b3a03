"""Files that are whole or absent, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_json_atomic(path, {"a": "ä"})
    before = path.read_bytes()
    assert before.decode() == '{\n  "a": "ä"\n}\n' and read_json(path) == {"a": "ä"}
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json_atomic(path, value)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_results_are_read_like_any_other_file(tmp_path: Path) -> None:
    plain, path, link = tmp_path / "plain", tmp_path / "new" / "folder" / "file", tmp_path / "link"
    plain.write_bytes(b"")
    write_bytes_atomic(path, b"1")
    assert path.stat().st_mode == plain.stat().st_mode
    link.symlink_to(path)
    write_bytes_atomic(link, b"2")
    assert link.is_symlink() and path.read_bytes() == b"2"
    write_bytes_atomic("/dev/null", b"3")  # a device stays one
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "cannot be read .*; give a file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda path: path.write_bytes(b"[" * 100_000), "not valid JSON"),
        (lambda path: path.write_text(json.dumps([1])[:-1]), "truncated"),
    ],
)
def test_what_cannot_be_read_is_named(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "file.json")
    with pytest.raises(DataError, match=rf"file\.json .*{message}|file\.json {message}"):
        read_json(tmp_path / "file.json")

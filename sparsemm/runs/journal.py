"""A file that grows by one record per finished item, so that long work can be stopped and taken up again."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sparsemm.errors import DataError
from sparsemm.io import write_bytes_atomic


class Journal:
    """Records by number, one JSON line each, the first line naming the settings they were made with.

    A record counts once its line is complete: what a crash left of a line is cut off when the file is opened again.

    Args:
        path: The file, or None to keep the records in memory only.
        settings: JSON values; a file made with others is not continued.
        resume: Read what the file holds. False starts an empty one.
        part: Number of the process, where several share the work: each appends to a file of its own beside `path`, and
            `merge` makes one of them. Every process reads what all of them have finished before.
        writes: False in a process whose records another one writes.

    Raises:
        DataError: The file was made with other settings, or is no journal.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        *,
        resume: bool = True,
        part: int | None = None,
        writes: bool = True,
    ) -> None:
        self.whole = path
        self.path = path if path is None or part is None else _part(path, part)
        self.settings = json.loads(json.dumps(settings))
        self.records: dict[int, dict[str, Any]] = {}
        self._handle: IO[bytes] | None = None
        self._keep = 0
        if path is not None and resume:
            kept = {found: self._read(found) for found in _files(path)}
            self._keep = kept.get(self.path, 0)
        if not writes:
            self.path = None

    def __enter__(self) -> Journal:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self.path, "r+b" if self._keep else "wb")
            self._handle.truncate(self._keep)
            self._handle.seek(self._keep)
            if not self._keep:
                self._write({"settings": self.settings})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def append(self, index: int, record: dict[str, Any]) -> None:
        """Add the record of item `index`; on return it is on disk."""
        self.records[index] = record
        if self.path is not None:
            self._write({"index": index, **record})

    def _write(self, value: dict[str, Any]) -> None:
        if self._handle is None:
            raise DataError(f"{self.path} is not open; use the journal in a with block")
        self._handle.write(_line(value))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def merge(self) -> None:
        """Make one file, in the order of the items, of the parts and the whole; nobody may be writing then."""
        if self.whole is None:
            return
        for path in _files(self.whole):
            self._read(path)
        ordered = [{"index": index, **self.records[index]} for index in sorted(self.records)]
        lines = b"".join(map(_line, [{"settings": self.settings}, *ordered]))
        if not self.whole.exists() or self.whole.read_bytes() != lines:
            write_bytes_atomic(self.whole, lines)
        for path in _files(self.whole):
            if path != self.whole:
                path.unlink()

    def reread(self) -> None:
        """Fill `records` from the whole file, as `merge` of another process left it."""
        if self.whole is not None:
            self._read(self.whole)

    def _read(self, path: Path) -> int:
        """Add a file's records; the number of its bytes that hold complete lines."""
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if not lines:
            return 0
        try:
            header, *records = [json.loads(line) for line in lines]
            found = header["settings"]
            for record in records:
                index = record.pop("index")
                if "skipped" not in record or index not in self.records:  # another part's may have been made later
                    self.records[index] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not a journal ({error}); remove it, or start over with --fresh (in Python resume=False)"
            ) from error
        if found != self.settings:
            changed = sorted(
                key for key in {*found, *self.settings} if found.get(key, self) != self.settings.get(key, self)
            )
            raise DataError(
                f"{path} was made with other settings ({', '.join(changed)}); give it another place, or start over "
                "with --fresh (in Python resume=False)"
            )
        return end


def remove_journal(path: Path) -> None:
    """Delete a journal and the parts of it."""
    for found in _files(path):
        found.unlink()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _part(path: Path, number: int) -> Path:
    return path.with_suffix(f".part{number}{path.suffix}")


def _files(path: Path) -> list[Path]:
    """The whole file and the parts that are there."""
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}.part*{path.suffix}"))
    return [path, *parts] if path.exists() else parts

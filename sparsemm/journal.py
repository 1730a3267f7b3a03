"""A file that grows by one record per finished item, so that long work can be stopped and taken up again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sparsemm.errors import DataError


class Journal:
    """Records by number, one JSON line each, the first line naming the settings they were made with.

    A record counts once its line is complete: what a crash left of a line is cut off when the file is opened again.

    Args:
        path: The file, or None to keep the records in memory only.
        settings: JSON values; a file made with others is not continued.
        resume: Read what the file holds. False starts an empty one.

    Raises:
        DataError: The file was made with other settings, or is no journal.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, resume: bool = True) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.records: dict[int, dict[str, Any]] = {}
        self._handle: IO[bytes] | None = None
        self._keep = self._read() if path is not None and resume and path.exists() else 0

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
        self._handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _read(self) -> int:
        """Fill `records`; the number of bytes that hold complete lines."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if not lines:
            return 0
        try:
            header, *records = [json.loads(line) for line in lines]
            found = header["settings"]
            self.records = {record.pop("index"): record for record in records}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path} is not a journal ({error}); remove it, or start without resuming") from error
        if found != self.settings:
            changed = sorted(
                key for key in {*found, *self.settings} if found.get(key, self) != self.settings.get(key, self)
            )
            raise DataError(
                f"{self.path} was made with other settings ({', '.join(changed)}); remove it, or start without resuming"
            )
        return end

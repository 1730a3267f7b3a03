"""Result files of experiments, benchmarks and collections of cells: complete after every run, taken up again."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_json_atomic

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Run:
    """One finished run of an experiment; its fields are JSON values."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells a run from the others of its file."""
        raise NotImplementedError

    @property
    def noisy(self) -> bool:
        """Whether its timings spread so far that the run is to be measured again."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `DataError` when a field is missing that has no default."""
        known = {each.name for each in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except TypeError as error:
            raise DataError(f"a result is not complete ({error}); delete the file or run again with --fresh") from None


AnyRun = TypeVar("AnyRun", bound=Run)
Key = TypeVar("Key", bound=tuple)


@dataclass
class RunFile(Generic[AnyRun]):
    """The settings that all runs of an experiment share, and the runs finished so far.

    Attributes:
        settings: JSON values. Runs are only ever added to a file of the same settings; "environment" may differ.
        runs: In the order they were finished.
        path: Where `add` writes; None keeps the results in memory.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1
    SUBJECT: ClassVar[str]
    RUN: ClassVar[type[Run]]
    LISTED: ClassVar[str] = "runs"

    settings: dict[str, Any]
    runs: list[AnyRun] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result file. Raises `DataError` when it is missing or is no such file."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("format") != cls.FORMAT:
            raise DataError(f"{path} is no result file of {cls.SUBJECT}; choose another path")
        if document.get("version") != cls.VERSION:
            raise DataError(
                f"{path} has format version {document.get('version')!r}, not {cls.VERSION}; run again with --fresh"
            )
        runs = [cls.RUN.from_dict(values) for values in document[cls.LISTED]]
        return cls(document.get("settings", {}), runs, Path(path))

    @classmethod
    def open(cls, path: str | Path | None, settings: dict[str, Any], *, fresh: bool = False) -> Self:
        """Continue the file at `path`, or start one.

        Raises:
            DataError: The file holds results of other settings, and `fresh` is off.
        """
        if path is None:
            return cls(settings)
        target = Path(path)
        if fresh or not target.exists():
            return cls(settings, path=target)
        found = cls.load(target)
        differences = [
            f"{name}: {found.settings.get(name)!r} there, {settings.get(name)!r} here"
            for name in sorted({*settings, *found.settings} - {"environment"})
            if found.settings.get(name) != settings.get(name)
        ]
        if differences:
            raise DataError(
                f"{target} holds results of other settings ({'; '.join(differences)}); "
                "choose another output, or start over with --fresh"
            )
        return found

    def find(self, *key: Any) -> AnyRun | None:
        """The finished run of that key, if there is one."""
        return next((run for run in self.runs if run.key == key), None)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that have no run yet, or a noisy one."""
        kept = {run.key for run in self.runs if not run.noisy}
        return [key for key in keys if key not in kept]

    def add(self, run: AnyRun) -> None:
        """Append a finished run, or put it in the place of an earlier one of its key, and write the whole file."""
        keys = [each.key for each in self.runs]
        if run.key in keys:
            self.runs[keys.index(run.key)] = run
        else:
            self.runs.append(run)
        self.write()

    def write(self) -> None:
        """Write the whole file, if there is one."""
        if self.path is not None:
            write_json_atomic(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        runs = [run.to_dict() for run in self.runs]
        return {"format": self.FORMAT, "version": self.VERSION, "settings": self.settings, self.LISTED: runs}


def versions() -> dict[str, str]:
    """Of this package and what it stands on, by name."""
    import torch
    import transformers

    import sparsemm

    return {
        "sparsemm": sparsemm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def environment(device: Any = "cpu") -> dict[str, Any]:
    """Versions and hardware a measurement belongs to, as JSON values."""
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        **versions(),
        "device": device.type,
        "hardware": name,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

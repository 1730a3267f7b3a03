"""Where a command writes is made sure of before anything is computed, and tidied up when it fails."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sparsemm.errors import ConfigError

_created: list[Path] = []  # folders that the running command made, outer ones first


def claim(*paths: Path | None) -> None:
    """Make the folders of files that will be written, and see that they can be; None stands for no file.

    Raises:
        ConfigError: A path is a folder, or lies where nothing can be written.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file in it")
        if not path.exists() or path.is_file():  # a device or a pipe is written to directly
            claim_folder(path.parent)


def claim_picture(path: Path | None) -> None:
    """As `claim`, for an image file. Raises `DataError` when its ending is no image format."""
    from sparsemm.runs.plots import image_format

    if path is not None:
        image_format(path)
        claim(path)


def claim_folder(folder: Path) -> None:
    """Make a folder for files that will be written, and see that they can be. Raises `ConfigError` if they cannot."""
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        _created.extend(reversed(missing))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"nothing can be written to {folder} ({error.strerror}); choose another output") from error


def settle() -> None:
    """End a command: the folders it made are removed again if nothing lies in them."""
    for folder in reversed(_created):
        try:
            folder.rmdir()
        except OSError:
            continue
    _created.clear()

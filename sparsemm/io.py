"""Files that are either complete or absent: results are written to a temporary name and renamed. And the hub."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sparsemm.errors import DataError


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that a reader, or a crash, never meets half a file. Parent folders are created.

    What a link points to is replaced, not the link; a device or a pipe is written to.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes files private; results are meant to be read like any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """`write_bytes_atomic` of `value` as JSON. Raises `ValueError` for NaN or infinity."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode("utf-8"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. Raises `DataError` naming the file when it is missing, unreadable or not JSON."""
    from sparsemm.errors import DataError

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DataError(f"{path} is not valid JSON ({error}); it may be truncated: make it again") from error


def reach_hub(name: str, file: str, *, kind: str = "model") -> None:
    """Ask the Hugging Face hub once for a file of `name`, a "model" or "dataset", unless it is here already.

    The libraries that load it would ask for half a minute before they said that there is no network.

    Raises:
        DataError: The hub does not answer, or `name` cannot be one of its ids. What it answers is not looked at.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))
    except HfHubHTTPError:  # an answer
        return
    except Exception as error:  # of whichever library huggingface_hub asks with
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is not here, and the hub does not answer ({reason}); check the name, or the network"
        ) from error

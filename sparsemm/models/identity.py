"""Which checkpoint a model is: its name and a digest of its weights, for files that belong to one model."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparsemm.models.parallel import whole

_WHOLE_FILE = 64 << 20  # bytes; of a larger file, blocks are read
_BLOCK, _NUM_BLOCKS = 64 << 10, 64
_IN_MEMORY = "memory-"


@dataclass(frozen=True)
class Identity:
    """A checkpoint, or what is known of it.

    Attributes:
        name: Folder name or hub id; None for a model that was built in memory.
        weights: `digest_of_files`, or of a model in memory `digest_of_parameters`; None where neither is at hand.
    """

    name: str | None
    weights: str | None

    @property
    def short_name(self) -> str | None:
        """Last part of the name: the same for a hub id and a folder that was cloned from it."""
        return None if self.name is None else self.name.rstrip("/").rpartition("/")[2]

    def has_weights_of(self, other: Identity) -> bool | None:
        """Whether the digests are equal; None where they are not of one kind, or one is missing."""
        if self.weights is None or other.weights is None:
            return None
        if self.weights.startswith(_IN_MEMORY) != other.weights.startswith(_IN_MEMORY):
            return None
        return self.weights == other.weights


def checkpoint_identity(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Identity:
    """Of a folder, or of a hub id whose files lie in the cache; the digest is None where no weights are at hand."""
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        # A folder of this machine means nothing elsewhere; its last part does.
        return Identity(folder.resolve().name, digest_of_files(folder))
    return Identity(text, digest_of_files(_cached(text, revision)))


def identity_of(model: nn.Module) -> Identity:
    """Of a loaded model: that of the checkpoint it came from, whatever its dtype, quantisation or device.

    Weights that are changed in memory afterwards are not seen: save such a model before files are made for it. Only
    where there are no files (a model built from a configuration), the digest is one of the parameters in memory.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    found = checkpoint_identity(name, getattr(config, "_commit_hash", None)) if name else Identity(None, None)
    return Identity(found.name, found.weights or digest_of_parameters(model))


def digest_of_files(folder: Path | None) -> str | None:
    """Digest of the safetensors files of a folder; None if there are none. Their names do not count.

    Files above 64 MiB are sampled: their size, and 64 blocks of 64 KiB from end to end.
    """
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    stats = [file.stat() for file in files]
    # A file of the same size and time is not read again.
    known = tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True))
    return _digest(known) if known else None


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{size} ".encode())
        with open(path, "rb") as handle:
            if size <= _WHOLE_FILE:
                digest.update(handle.read())
                continue
            for index in range(_NUM_BLOCKS):
                handle.seek(index * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()[:16]


def digest_of_parameters(model: nn.Module) -> str:
    """Digest of the first values of every parameter in memory, marked as such: it is comparable to its like only."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            parameter = whole(parameter)
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return _IN_MEMORY + digest.hexdigest()[:16]


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the cache of downloads, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # a path that is gone, or a name of no model at all
        return None
    return Path(found).parent if isinstance(found, str) else None

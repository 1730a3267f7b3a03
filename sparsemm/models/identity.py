"""Which checkpoint a model is: its name and a digest of its weights, for files that belong to one model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_digest(model: nn.Module) -> str:
    """A digest of the first values of every parameter: tells a checkpoint from another of the same shape and name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model_name_of(model: PreTrainedModel) -> str:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    # A folder of this machine means nothing elsewhere; its last part does.
    return Path(name).resolve().name if Path(name).is_dir() else name

"""Loading of the compiled kernels (`_kernels_cpu.so`, `_kernels_cuda.so`, built by csrc/build.py).

A library registers its kernels for one dispatch key, beside the PyTorch twins that serve every other device. One that
is missing, broken or built for other schemas is left out with a line in the log, and the twins serve instead.
SPARSEMM_KERNELS=reference leaves both out.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
from pathlib import Path

from sparsemm.errors import ConfigError
from sparsemm.ops.schemas import SCHEMAS

logger = logging.getLogger(__name__)

LIBRARY_DIR = Path(__file__).resolve().parent
_LOADED: dict[str, ctypes.CDLL] = {}


def schema_hash() -> str:
    """Hash of the operators' schemas; a library built for another one is not loaded."""
    return hashlib.sha256(json.dumps(SCHEMAS, sort_keys=True).encode()).hexdigest()[:16]


def is_loaded(part: str) -> bool:
    """Whether the compiled kernels for `part` ("cpu" or "cuda") serve in this process."""
    return part in _LOADED


def load_library(part: str, path: Path) -> bool:
    """Loads one kernel library and registers its kernels; False, with a warning, where that is not possible."""
    try:
        library = ctypes.CDLL(str(path))
        library.sparsemm_schema_hash.restype = ctypes.c_char_p
        if library.sparsemm_schema_hash().decode() != schema_hash():
            raise OSError("it was built for other operator schemas")
        if status := library.sparsemm_register():
            raise OSError(f"its kernels could not be registered: step {status}")
    except (OSError, AttributeError) as error:
        logger.warning(
            "%s cannot be loaded (%s); PyTorch operators serve instead. Run `make kernels`", path.name, error
        )
        return False
    _LOADED[part] = library
    logger.debug("%s serves the %s", path.name, part)
    return True


def load_libraries() -> None:
    """Loads what is built, unless SPARSEMM_KERNELS asks for the PyTorch twins."""
    choice = os.environ.get("SPARSEMM_KERNELS", "auto")
    if choice not in {"auto", "reference"}:
        raise ConfigError(f"SPARSEMM_KERNELS={choice!r} is unknown; use auto or reference")
    if choice == "reference":
        return
    for part in ("cpu", "cuda"):
        path = LIBRARY_DIR / f"_kernels_{part}.so"
        if path.exists():
            load_library(part, path)

"""The seam between the method and its kernels: `torch.ops.sparsemm.*`, ragged rows in, ragged rows out.

Importing this package defines the operators (`schemas.py`), gives every device the PyTorch twins of `reference.py` and
lets the compiled kernels, where they are built, serve theirs (`library.py`).
"""

from __future__ import annotations

import torch

from sparsemm.ops import library, reference, schemas

for _name in schemas.SCHEMAS:
    schemas.LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
library.load_libraries()

# PyTorch's dispatcher remembers the Python object of an operator once a dispatch mode has seen it, without keeping it
# alive; holding the overloads here does.
_OVERLOADS = [getattr(torch.ops.sparsemm, name).default for name in schemas.SCHEMAS]

"""The seam between the method and its kernels: `torch.ops.sparsemm.*`, ragged rows in, ragged rows out.

Importing this package defines the operators (`schemas.py`), gives every device the PyTorch twins of `reference.py` and
lets the compiled kernels, where they are built, serve theirs (`library.py`).
"""

from __future__ import annotations

from sparsemm.ops import library, reference, schemas

for _name in schemas.SCHEMAS:
    schemas.LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
library.load_libraries()

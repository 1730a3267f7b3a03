"""The seam between the method and its kernels: `torch.ops.sparsemm.*`, ragged rows in, ragged rows out.

Importing this package defines the operators (`schemas.py`) and gives every device the PyTorch twins of `reference.py`.
"""

from __future__ import annotations

from sparsemm.ops import reference, schemas

for _name in schemas.SCHEMAS:
    schemas.LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

"""What the entry point `lmms_eval.models` returns; nothing heavy is imported, lmms-eval calls it at every start."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_CLASSES = {
    "sparsemm": "sparsemm_lmms_eval.model.SparseMMModel",
    "sparsemm_llava_next": "sparsemm_lmms_eval.model.SparseMMLlavaNext",
    "sparsemm_qwen2_vl": "sparsemm_lmms_eval.model.SparseMMQwen2VL",
}


def manifests() -> list[ModelManifest]:
    """The models of this package, chat interface only."""
    # Imported late: lmms_eval.models reads the entry points while it is itself being imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, chat_class_path=path) for name, path in MODEL_CLASSES.items()]

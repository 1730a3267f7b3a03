"""Model families: loading, prompts and image-token geometry, one file a family."""

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout
from sparsemm.models.loading import FAMILIES, family_of, load_model

__all__ = ["FAMILIES", "ImageLayout", "ModelFamily", "family_of", "load_model"]

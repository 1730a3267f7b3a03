"""Images with text boxes, to chase visual heads on: annotation files, Hugging Face data sets, generators."""

from sparsemm.datasets.base import BoxedImage, read_words
from sparsemm.datasets.convert import WRITERS, convert
from sparsemm.datasets.registry import FORMATS, open_pages

__all__ = ["BoxedImage", "FORMATS", "WRITERS", "convert", "open_pages", "read_words"]

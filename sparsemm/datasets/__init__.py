"""Images with text boxes, to chase visual heads on: annotation files, Hugging Face data sets, generators."""

from sparsemm.datasets.base import BoxedImage, read_words
from sparsemm.datasets.convert import WRITERS, convert
from sparsemm.datasets.questions import Question, open_questions
from sparsemm.datasets.registry import FORMATS, open_pages

__all__ = ["BoxedImage", "FORMATS", "Question", "WRITERS", "convert", "open_pages", "open_questions", "read_words"]

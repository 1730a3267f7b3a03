"""Images with text boxes, to chase visual heads on: annotation files, Hugging Face data sets, generators."""

from sparsemm.datasets.base import BoxedImage, read_words
from sparsemm.datasets.convert import WRITERS, convert
from sparsemm.datasets.pdf import PdfPages
from sparsemm.datasets.questions import Question, open_questions
from sparsemm.datasets.registry import FORMATS, open_pages
from sparsemm.datasets.show import draw_boxes

__all__ = [
    "BoxedImage", "FORMATS", "PdfPages", "Question", "WRITERS", "convert", "draw_boxes", "open_pages", "open_questions",
    "read_words",
]  # fmt: skip

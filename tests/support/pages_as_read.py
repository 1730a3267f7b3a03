"""Pages whose words are what a random model reads on them, so that a chase on it scores."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from PIL import Image

from sparsemm.chase import READ_PROMPT
from sparsemm.chase.matching import token_texts
from sparsemm.models import family_of

TOKENS = 10
SIZE = (61, 34)


def page_of(model, processor) -> SimpleNamespace:
    """Noise whose words are what the random model says about it, in boxes wide enough to be hit now and then."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    inputs = family_of(model).build_inputs(processor, [[image]], [READ_PROMPT])
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    texts = [text for text in token_texts(processor.tokenizer, ids) if text.strip()]
    boxes = [(15, 0, 45, 33), (18, 5, 40, 30), (10, 0, 59, 20)]
    third = -(-len(texts) // 3)
    parts = ["".join(texts[start : start + third]) for start in range(0, len(texts), third)]
    words = [SimpleNamespace(text=part, box=box) for part, box in zip(parts, boxes, strict=True)]
    return SimpleNamespace(image=image, words=[word for word in words if word.text])

"""Pages for experiments on a toy model, and head scores of its shape."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from toy_models import toy_model, toy_processor

from sparsemm import HeadScores
from sparsemm.decoding.generation import generate_greedy
from sparsemm.models import family_of

SCORES = HeadScores(torch.tensor([[8.0, 1, 2, 3], [4, 7, 5, 6]]), model="toy")


def pages(count: int = 3) -> list[SimpleNamespace]:
    """Noise with the answers that the whole model gives to it, so that masking can only do harm."""
    model, processor = toy_model("qwen2-vl"), toy_processor("qwen2-vl")
    made = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        image, prompt = Image.fromarray(noise), "read" if index % 2 else "find"
        inputs = family_of(model).build_inputs(processor, [image], [prompt])
        tokens, _ = generate_greedy(model, inputs, 8)
        answer = processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
        task = "read" if index % 2 else "field"
        made.append(SimpleNamespace(image=image, prompt=prompt, answer=answer, task=task, num_words=1))
    return made

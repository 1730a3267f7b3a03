"""The chase on every image family: what it counts equals a brute force over whole attention matrices."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_vlms import TOYS, toy_vlm

from sparsemm.chase import READ_PROMPT, chase
from sparsemm.chase.matching import match_rule, token_texts
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


def brute_force(name: str, page: SimpleNamespace) -> np.ndarray:
    model, processor = toy_vlm(name, attn_implementation="eager")
    family = family_of(model)
    inputs = family.build_inputs(processor, [[page.image]], [READ_PROMPT])
    sources = {"processor": processor, "image_sizes": [page.image.size]}
    (layout,) = family.image_token_layout(model.config, inputs, **sources)[0]
    result = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    ids = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    chunks = match_rule("aligned")(token_texts(processor.tokenizer, ids), [word.text for word in page.words])
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    totals = [[Fraction(0)] * text.num_attention_heads for _ in full]
    for step, chunk in enumerate(chunks):
        if chunk is None:
            continue
        region = set(layout.tokens_in_box(page.words[chunk].box, page.image.size).tolist())
        for layer, row in zip(full, totals, strict=True):
            for head in range(len(row)):
                if int(result.attentions[step][layer][0, head, -1].argmax()) in region:
                    row[head] += Fraction(1, len(region))
    return np.array([[float(value) for value in row] for row in totals])


@pytest.mark.parametrize("name", TOYS)
def test_scores_equal_a_brute_force(name: str) -> None:
    try:
        model, processor = toy_vlm(name)
    except ImportError as error:
        pytest.skip(str(error))
    page = page_of(model, processor)
    expected = brute_force(name, page)
    assert expected.sum() > 0, "choose another picture: nothing is hit"
    scores = chase(model, processor, [page], match="aligned", max_new_tokens=TOKENS, progress=False)
    np.testing.assert_allclose(scores.values.numpy(), expected / expected.sum(), rtol=1e-12)

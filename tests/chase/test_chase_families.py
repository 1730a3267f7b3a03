"""The chase on every image family: what it counts equals a brute force over whole attention matrices."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from pages_as_read import TOKENS, page_of
from toy_vlms import TOYS, toy_vlm

from sparsemm.chase import READ_PROMPT, chase
from sparsemm.chase.matching import match_rule, token_texts
from sparsemm.models import family_of


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
    model, processor = toy_vlm(name)
    page = page_of(model, processor)
    expected = brute_force(name, page)
    assert expected.sum() > 0, "choose another picture: nothing is hit"
    scores = chase(model, processor, [page], match="aligned", max_new_tokens=TOKENS, progress=False)
    np.testing.assert_allclose(scores.values.numpy(), expected / expected.sum(), rtol=1e-12)

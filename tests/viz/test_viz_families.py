"""Pictures of every family: what they show is what whole attention matrices and caches hold, and they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from greedy_runs import scores
from PIL import Image
from toy_vlms import TOYS, toy_vlm

import sparsemm
from sparsemm import CompressionConfig
from sparsemm.chase import READ_PROMPT
from sparsemm.models import FAMILIES, family_of
from sparsemm.models.layers import ragged_layers
from sparsemm.runs.plots import save_figure
from sparsemm.viz.kept import kept_rows
from sparsemm.viz.page import page_data
from sparsemm.viz.reading import read_with_attention
from sparsemm.viz.sheets import draw_kept, draw_overlays

HEADS = [(0, 0), (1, 3)]
NAMES = [name for name in TOYS if name in FAMILIES or "crops" in name]
SIZE = (61, 34)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_viz_draws_what_the_model_does(name: str, tmp_path: Path) -> None:
    model, processor = toy_vlm(name)
    reading = read_with_attention(model, processor, picture(), HEADS, max_new_tokens=2)

    eager, _ = toy_vlm(name, attn_implementation="eager")
    family, layers = family_of(eager), ragged_layers(eager.config.get_text_config())
    inputs = family.build_inputs(processor, [picture()], [READ_PROMPT])
    (layout,) = family.image_token_layout(eager.config, inputs, processor=processor, image_sizes=[SIZE])[0]
    result = eager.generate(
        **inputs, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    for step, attentions in enumerate(result.attentions):
        for place, (layer, head) in enumerate(HEADS):
            expected = attentions[layers[layer]][0, head, -1, layout.columns]
            torch.testing.assert_close(reading.weights[step, place], expected, rtol=1e-4, atol=1e-6)

    config = CompressionConfig(method="snapkv", budget=12, window_size=4)
    kept = kept_rows(model, processor, picture(), config)
    with sparsemm.patch(model, config) as handle, torch.inference_mode():
        model(**inputs, use_cache=True)
        assert torch.equal(kept.rows(), handle.stats.kept_rows[0])

    table = scores(model)
    figures = {
        "overlay": draw_overlays(reading, tokens=[1], parts=list(layout.grids), scores=table),
        "kept": draw_kept(kept, layers=[1], scores=table),
    }
    for what, figure in figures.items():
        save_figure(figure, tmp_path / f"{what}.png")
        pixels = np.asarray(Image.open(tmp_path / f"{what}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert page_data(reading)["tokens"] == reading.tokens

"""A calibration of a model with sliding windows measures the layers that keep ragged rows."""

from __future__ import annotations

import torch
from PIL import Image
from toy_vlms import toy_vlm

from sparsemm import CompressionConfig
from sparsemm.calibration.page import distortion_curves, integrated_gradients, read_prompt
from sparsemm.models import family_of


def test_only_ragged_layers_are_measured() -> None:
    model, processor = toy_vlm("gemma3")
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    inputs = dict(family_of(model).build_inputs(processor, [image], ["Read it."]))
    answer = torch.tensor([[40, 41, 42, 43]])
    prompt = read_prompt(model, inputs, CompressionConfig(method="snapkv", budget=14, window_size=4))
    gradients, losses = integrated_gradients(model, prompt, answer, 4)
    curves = distortion_curves(model, prompt, answer, 4)
    assert len(prompt.rankings["distortions"]) == 2 and gradients.shape == (2, 4)
    assert all(each.shape[:2] == (2, 4) for each in curves.values())
    assert bool((gradients != 0).all())
    together = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.ones(1, prompt.length + 4, dtype=torch.long),
        "token_type_ids": torch.cat([inputs["token_type_ids"], torch.zeros_like(answer)], dim=1),
    }
    with torch.no_grad():
        logits = model(**together).logits[0, prompt.length - 1 : -1]
    assert abs(losses[0] - float(torch.nn.functional.cross_entropy(logits, answer[0]))) < 1e-5

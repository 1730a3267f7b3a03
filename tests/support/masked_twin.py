"""A full-size cache whose dropped positions are masked out: the independent twin of the evicting cache."""

from __future__ import annotations

import numpy as np
import torch
from reference import kept_by
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

MARGIN = 1e-5  # below this the float32 scores may order two positions differently


class MaskedTwin:
    """An attention function for one generation of batch 1."""

    def __init__(self, settings, scores, num_layers):
        self.settings, self.num_layers = settings, num_layers
        self.table = None if scores is None else np.asarray(scores.values, dtype=np.float64)
        measured = None if scores is None else scores.curves
        self.curves = None
        if measured is not None:
            self.curves = measured.sensitivities.numpy(), measured.distortions.numpy(), measured.rows
        self.dropped, self.kept, self.margin = {}, {}, np.inf

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        prompt = query.shape[2]
        layer_types = getattr(module.config, "layer_types", None) or ["full_attention"] * (module.layer_idx + 1)
        layer_idx = layer_types[: module.layer_idx].count("full_attention")
        if layer_types[module.layer_idx] != "full_attention":
            dropped = None
        elif layer_idx not in self.dropped:
            self._choose(layer_idx, query[0], key[0], scaling)
            dropped = None
        else:
            dropped = self.dropped[layer_idx]
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(2, 3) * scaling
        if attention_mask is None:
            columns = torch.arange(key.shape[2])
            attention_mask = columns <= (key.shape[2] - prompt + torch.arange(prompt))[:, None]
        logits = logits.masked_fill(~attention_mask, float("-inf"))
        if dropped is not None:
            hidden = torch.nn.functional.pad(dropped, (0, key.shape[2] - dropped.shape[1]))
            logits = logits.masked_fill(hidden.repeat_interleave(group, 0)[:, None], float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def _choose(self, layer_idx, query, key, scaling):
        more = {"num_layers": self.num_layers, "scores": self.table, "curves": self.curves, "scaling": scaling}
        kept = kept_by(self.settings, query, key, layer_idx=layer_idx, **more)
        self.margin = min(self.margin, kept.margin)
        self.kept[layer_idx] = [len(positions) for positions in kept.positions]
        dropped = torch.ones(key.shape[:2], dtype=torch.bool)
        for head, positions in enumerate(kept.positions):
            dropped[head, positions] = False
        self.dropped[layer_idx] = dropped


def attend_by(twin, model):
    """From now on the text part of `model` (unpatched) attends by `twin`."""
    AttentionInterface.register("masked_twin", twin)
    AttentionMaskInterface.register("masked_twin", sdpa_mask)
    one_config = model.config.get_text_config() is model.config
    model.set_attn_implementation("masked_twin" if one_config else {"text_config": "masked_twin"})

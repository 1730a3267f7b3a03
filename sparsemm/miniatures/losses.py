"""What a miniature is trained to do: name the cells of a page (glyphs), answer its questions (symbols, pages)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm.miniatures.batches import IGNORE, Batch
from sparsemm.miniatures.vision import image_embeddings

NOISE = 0.3
"""Length of the random vector added to a symbol's embedding, whose own length is 1."""
ATTENTION = "float32_sdpa"
"""Torch's attention, whose backward pass takes a CPU up to four times as long in bfloat16 as in float32."""


def _float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> Any:
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)


AttentionInterface.register(ATTENTION, _float32_attention)


def loss(model: PreTrainedModel, kind: str, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The loss of a stage of `kind`, and which of the answers' tokens (glyphs: of the cells with ink) are right.

    In bfloat16 where that is safe. `generator` draws what disturbs symbols, as a vision tower would.
    """
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "glyphs":
            return _glyph_loss(model, batch, image_embeddings(model, batch.pixels))
        embeddings = F.embedding(batch.input_ids, model.get_input_embeddings().weight)
        if kind == "pages":
            image = image_embeddings(model, batch.pixels)
        else:
            image = embeddings[:, batch.image]
            image = image + NOISE / image.shape[-1] ** 0.5 * torch.randn(image.shape, generator=generator)
        before, after = embeddings[:, : batch.image.start], embeddings[:, batch.image.stop :]
        return _answer_loss(model, batch, torch.cat([before, image, after], dim=1))


def _answer_loss(model: PreTrainedModel, batch: Batch, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens."""
    positions = batch.positions[:1]
    if model.config.model_type == "qwen2_vl":
        positions = batch.positions[:, None].expand(3, len(embeddings), -1)
    hidden = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    chosen = batch.labels != IGNORE
    logits, targets = model.lm_head(hidden.last_hidden_state[chosen]).float(), batch.labels[chosen]
    return F.cross_entropy(logits, targets), logits.argmax(-1) == targets


def _glyph_loss(model: PreTrainedModel, batch: Batch, image: Tensor) -> tuple[Tensor, Tensor]:
    """Names the cells through the embedding table, and pulls each embedding onto its character's row.

    Blank cells are most of a page: they and the inked ones weigh the same.
    """
    table, image = model.get_input_embeddings().weight, image.float()
    targets = batch.input_ids[:, batch.image]
    logits = image @ table.T * table.shape[1] ** 0.5
    named = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    each = named + (image - table[targets]).square().sum(-1)
    inked = ~torch.isin(targets, batch.blanks)
    return each[inked].mean() + each[~inked].mean(), (logits.argmax(-1) == targets)[inked]

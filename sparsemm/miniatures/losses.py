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
            return _glyph_loss(model, batch, image_embeddings(model, batch.pixels)[0])
        embeddings = F.embedding(batch.input_ids, model.get_input_embeddings().weight)
        deepstack: list[Tensor] = []
        if kind == "pages":
            image, deepstack = image_embeddings(model, batch.pixels)
        else:
            image = embeddings[:, batch.image]
            image = image + NOISE / image.shape[-1] ** 0.5 * torch.randn(image.shape, generator=generator)
        before, after = embeddings[:, : batch.image.start], embeddings[:, batch.image.stop :]
        return _answer_loss(model, batch, torch.cat([before, image, after], dim=1), deepstack)


def read(
    model: PreTrainedModel, embeddings: Tensor, positions: Tensor, image: slice, deepstack: list[Tensor]
) -> Tensor:
    """The language model's last hidden states `[B, S, hidden_size]`; arguments as in `Batch` and `image_embeddings`."""
    inputs: dict[str, Any] = {"inputs_embeds": embeddings, "position_ids": positions[:1]}
    if "mrope_section" in model.config.text_config.rope_parameters:
        inputs["position_ids"] = positions[:, None].expand(3, len(embeddings), -1)
    if deepstack:
        inputs["visual_pos_masks"] = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        inputs["visual_pos_masks"][:, image] = True
        inputs["deepstack_visual_embeds"] = deepstack
    return model.model.language_model(**inputs, use_cache=False).last_hidden_state


def _answer_loss(
    model: PreTrainedModel, batch: Batch, embeddings: Tensor, deepstack: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens."""
    hidden = read(model, embeddings, batch.positions, batch.image, deepstack)
    chosen = batch.labels != IGNORE
    logits, targets = model.lm_head(hidden[chosen]).float(), batch.labels[chosen]
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

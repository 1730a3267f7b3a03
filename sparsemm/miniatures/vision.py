"""From page pixels to image-token embeddings, batched: what the stock processors and models do, page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsemm.miniatures.architectures import IMAGE_MEAN, IMAGE_STD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _normalise(pixels: np.ndarray) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` with CLIP's mean and deviation."""
    scale = torch.tensor(IMAGE_STD) * 255.0
    return ((torch.tensor(pixels) - torch.tensor(IMAGE_MEAN) * 255.0) / scale).permute(0, 3, 1, 2)


def qwen_inputs(pixels: np.ndarray, *, patch: int = 8, merge: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """`pixel_values` `[B * patches, 6 * patch * patch]` and `image_grid_thw` `[B, 3]` of uint8 pages `[B, H, W, 3]`."""
    images = _normalise(pixels)
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    blocks = images.view(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, rows/m, columns/m, m, m, C, patch, patch
    blocks = blocks.unsqueeze(6).expand(*blocks.shape[:6], 2, patch, patch)  # a still image fills both frames
    return blocks.reshape(batch * rows * columns, -1), torch.tensor([[1, rows, columns]] * batch)


def llava_inputs(pixels: np.ndarray) -> torch.Tensor:
    """`pixel_values` `[B, 5, 3, H / 2, W / 2]` of uint8 pages `[B, H, W, 3]`: the page halved, then its quarters."""
    from PIL import Image

    batch, height, width, _ = pixels.shape
    size = (width // 2, height // 2)
    halves = [np.asarray(Image.fromarray(page).resize(size, Image.Resampling.BICUBIC)) for page in pixels]
    base = _normalise(np.stack(halves))
    tiles = _normalise(pixels).view(batch, 3, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([base[:, None], tiles], dim=1)


def image_embeddings(model: PreTrainedModel, pixels: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Image-token embeddings of uint8 pages `[B, H, W, 3]`: `[B, image_tokens, hidden_size]`, in the model's order.

    And what is added to the image tokens behind each of the first text layers, `[B * image_tokens, hidden_size]` each
    (Qwen3-VL's deepstack; none in the other families).
    """
    body = model.model
    width = model.config.text_config.hidden_size
    if hasattr(body, "visual"):
        values, grid = qwen_inputs(pixels, patch=body.visual.config.patch_size, merge=body.visual.spatial_merge_size)
        output = body.visual(values, grid_thw=grid)
        return output.pooler_output.view(len(pixels), -1, width), output.get("deepstack_features") or []
    values = llava_inputs(pixels)
    batch, views = values.shape[:2]
    hidden = body.vision_tower(values.flatten(0, 1), output_hidden_states=True).hidden_states
    features = body.multi_modal_projector(hidden[model.config.vision_feature_layer][:, 1:])  # without the class token
    side = int(features.shape[1] ** 0.5)
    features = features.view(batch, views, side, side, -1)
    tiles = features[:, 1:].view(batch, 2, 2, side, side, -1).transpose(2, 3).reshape(batch, 2 * side, 2 * side, -1)
    newline = body.image_newline.to(tiles.dtype).expand(batch, 2 * side, 1, -1)
    return torch.cat([features[:, 0].flatten(1, 2), torch.cat([tiles, newline], dim=2).flatten(1, 2)], dim=1), []

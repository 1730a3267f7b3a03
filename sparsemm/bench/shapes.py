"""Models by their shapes: random weights of a real checkpoint's sizes, as speed and memory do not depend on values."""

from __future__ import annotations

import copy
import functools
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemm.errors import ConfigError
from sparsemm.head_scores import HeadScores

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sparsemm.models.parallel import TensorParallel


_LARGE_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_VICUNA = dict(
    **dict(model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    **dict(num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5),
)
_MISTRAL = {
    **_VICUNA,
    **dict(model_type="mistral", intermediate_size=14336, num_key_value_heads=8),
    **dict(rope_parameters=_LARGE_ROPE, sliding_window=None),
}
_QWEN = dict(
    **dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
    **dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_parameters={**_LARGE_ROPE, "mrope_section": [16, 24, 24]}),
)
_QWEN2 = {**_QWEN, "model_type": "qwen2", "rope_parameters": _LARGE_ROPE}
_QWEN3 = dict(
    **dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    **dict(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6),
    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
)
_TINY = dict(
    **dict(model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4),
    **dict(num_attention_heads=8, num_key_value_heads=8, head_dim=32),
)
_TINY_VISION = dict(
    **dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2),
    **dict(num_attention_heads=2, image_size=56, patch_size=14, projection_dim=32),
)

SHAPES: dict[str, dict[str, Any]] = {
    "vicuna-7b": dict(model_type="llava_next", text_config=_VICUNA, image_token_index=32063),
    "mistral-7b": dict(model_type="llava_next", text_config=_MISTRAL, image_token_index=32063),
    "qwen2-vl-7b": dict(
        **dict(model_type="qwen2_vl", text_config=_QWEN, image_token_id=151655, video_token_id=151656),
        vision_config=dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4, patch_size=14),
    ),
    "qwen2.5-vl-7b": dict(
        **dict(model_type="qwen2_5_vl", text_config=_QWEN, image_token_id=151655, video_token_id=151656),
        vision_config=dict(
            **dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14),
            **dict(out_hidden_size=3584, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        ),
    ),
    "qwen3-vl-8b": dict(
        **dict(model_type="qwen3_vl", text_config=_QWEN3, image_token_id=151655, video_token_id=151656),
        vision_config=dict(
            **dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16),
            **dict(out_hidden_size=4096, deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304),
        ),
    ),
    "internvl3-8b": dict(
        **dict(model_type="internvl", text_config={**_QWEN2, "vocab_size": 151674}, image_token_id=151667),
        vision_config=dict(
            **dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
            **dict(image_size=[448, 448], patch_size=[14, 14]),
        ),
    ),
    "llava-onevision-7b": dict(
        **dict(model_type="llava_onevision", text_config={**_QWEN2, "vocab_size": 152000}, image_token_index=151646),
        vision_config=dict(
            **dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26),
            **dict(num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False),
        ),
    ),
    "tiny": dict(
        **dict(model_type="llava_next", text_config=_TINY, vision_config=_TINY_VISION, image_token_index=511),
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    ),
}
"""Configurations by name: those of the paper, of later models, and one that a CPU times in seconds."""


def shape_config(name: str) -> PretrainedConfig:
    """The configuration of the shape called `name`, or of the folder `name`.

    Raises:
        ConfigError: No such shape or folder.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        return AutoConfig.for_model(**copy.deepcopy(SHAPES[name]))
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    raise ConfigError(f"model {name!r} is neither a folder with a config.json nor one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class AttentionShape:
    """Attention of one model: layers, query heads, kv heads, head dim."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Of a model's configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return AttentionShape(text.num_hidden_layers, heads, text.num_key_value_heads, head_dim)


def random_model(
    name: str, *, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A model of the shape called `name`, or of the configuration in the folder `name`, with random weights.

    Raises:
        ConfigError: No such shape, folder or attention.
        UnsupportedModelError: The configuration is of another class.
    """
    import transformers

    from sparsemm.models import family_of
    from sparsemm.models.loading import check_attention

    check_attention(attn_implementation)
    config = shape_config(name)
    model_class = getattr(transformers, family_of(config).model_class)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


def divided_model(name: str, parallel: TensorParallel, **options: Any) -> PreTrainedModel:
    """`random_model(name, **options)`, divided among the processes of `parallel`; by way of a folder that is gone
    afterwards, for which there has to be room. Raises what `random_model` does, and `check_plan`."""
    import transformers

    from sparsemm.models import family_of
    from sparsemm.models.parallel import check_plan, divide

    config = shape_config(name)
    check_plan(config, parallel.size)
    folder = Path(parallel.collect(tempfile.mkdtemp() if parallel.first else None)[0])
    try:
        parallel.together(lambda: random_model(name, **options).save_pretrained(folder) if parallel.first else None)
        settings = {"dtype": options["dtype"], "attn_implementation": options.get("attn_implementation", "sdpa")}
        model_class = getattr(transformers, family_of(config).model_class)
        model = divide(functools.partial(model_class.from_pretrained, folder, **settings), parallel)
        parallel.collect(None)
    finally:
        if parallel.first:
            shutil.rmtree(folder, ignore_errors=True)
    model.generation_config.pad_token_id = 0
    return model.eval()


def skewed_head_scores(layers: int, heads: int) -> HeadScores:
    """Scores as concentrated as those of the original release, in seeded places: a twentieth of the heads hold 55 % of
    the mass, the highest is 26 times the mean, and a hundredth of the heads have none.

    The head above which a share v of all heads lies has (v + 0.03) ** -1.72. Python's generator keeps its sequence over
    versions, so the table is the same everywhere.
    """
    count = layers * heads
    values = [(index / count + 0.03) ** -1.72 for index in range(count)]
    zeros = round(0.01 * count)
    values[count - zeros :] = [0.0] * zeros
    random.Random(0).shuffle(values)
    return HeadScores(torch.tensor(values, dtype=torch.float64).view(layers, heads))


def prompt_inputs(model: PreTrainedModel, tokens: int, batch: int = 1) -> dict[str, Tensor]:
    """A prompt of exactly `tokens` tokens a row: one image where it fits, then random text; on the model's device.

    Raises:
        ConfigError: Fewer than two tokens.
    """
    if tokens < 2:
        raise ConfigError(f"a prompt of {tokens} tokens is too short; use at least 2")
    from sparsemm.models import family_of

    config, generator = model.config, torch.Generator().manual_seed(tokens)
    text = config.get_text_config()
    special = [
        getattr(config, name, None)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ]
    highest = min([text.vocab_size, *(each for each in special if each is not None and each > 16)])
    input_ids = torch.randint(3, highest, (batch, tokens), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    family = family_of(config)
    image = family.random_image(config, model.dtype, tokens - 1)
    image_tokens = len(family.image_layouts(config, image)[0]) if image else 0
    if 0 < image_tokens < tokens:
        input_ids[:, 1 : 1 + image_tokens] = config.image_token_id
        inputs |= {name: tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for name, tensor in image.items()}
    return {name: tensor.to(model.device) for name, tensor in family.finish_inputs(config, inputs).items()}

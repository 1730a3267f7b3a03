"""From a checkpoint's name to a model and its processor."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsemm.errors import ConfigError, DataError, UnsupportedModelError
from sparsemm.io import reach_hub
from sparsemm.models.family import ModelFamily
from sparsemm.models.gemma3 import GEMMA3
from sparsemm.models.glm4v import GLM4V
from sparsemm.models.idefics3 import IDEFICS3, SMOLVLM
from sparsemm.models.internvl import INTERNVL
from sparsemm.models.llava import LLAVA
from sparsemm.models.llava_next import LLAVA_NEXT
from sparsemm.models.llava_onevision import LLAVA_ONEVISION
from sparsemm.models.mistral3 import MISTRAL3
from sparsemm.models.parallel import ALONE, check_plan, divide, join
from sparsemm.models.qwen2_5_vl import QWEN2_5_VL
from sparsemm.models.qwen2_vl import QWEN2_VL
from sparsemm.models.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from sparsemm.models.text_only import TEXT_ONLY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

_FAMILIES = (
    LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, INTERNVL, GLM4V, IDEFICS3,
    SMOLVLM, MISTRAL3, GEMMA3,
)  # fmt: skip
FAMILIES: dict[str, ModelFamily] = {family.name: family for family in _FAMILIES}
"""Families of models with images, by `model_type`; every other language model is one of `TEXT_ONLY`."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""Files of which a checkpoint holds at least one."""


def family_of(model_or_config: nn.Module | PretrainedConfig) -> ModelFamily:
    """The family of a model or of its configuration.

    Raises:
        UnsupportedModelError: It is of no supported class.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)
    model_class = family.model_class if family else _language_model_class(model_type)
    shown = repr(model_type)
    if isinstance(model_or_config, nn.Module):
        shown = type(model_or_config).__name__
        if model_class not in {base.__name__ for base in type(model_or_config).__mro__}:
            model_class = None
        if family is None and hasattr(model_or_config, "create_masks_for_generate"):
            raise UnsupportedModelError(
                f"{shown} makes attention masks of its own (prefix masks, for one), in which tokens attend to later "
                "ones; attention over kept rows knows causal masks only"
            )
    if model_class is None:
        known = ", ".join(each.model_class for each in _FAMILIES)
        raise UnsupportedModelError(
            f"{shown} is not supported; use the whole model, unwrapped: one of {known}, or a language model that "
            "AutoModelForCausalLM loads"
        )
    return family or TEXT_ONLY


def _language_model_class(model_type: str | None) -> str | None:
    """Name of the class that `AutoModelForCausalLM` gives a configuration of language alone; None for others."""
    from transformers.models.auto import modeling_auto

    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return None
    return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    tensor_parallel: bool | int = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a checkpoint folder, or a model of the Hugging Face hub, for inference.

    Args:
        name_or_path: A folder as `save_pretrained` writes it, or a hub id ("llava-hf/llava-v1.6-vicuna-7b-hf").
        device: "cuda" where there is one, else "cpu"; "auto" spreads the layers (needs accelerate).
        dtype: bfloat16 on a GPU, float32 on the CPU; a `torch.dtype`, its name, or "auto" for the checkpoint's own.
        attn_implementation: transformers' name of the prefill attention: "sdpa", "eager", "flash_attention_2".
        min_pixels, max_pixels: Bounds of the area images are resized to, for families that resize to any size.
        tensor_parallel: Divide every layer among processes, which all call this: True for all that the launcher
            (torchrun) has started, or how many hold one model. Each has a GPU of its own, or all compute on the CPU.

    Returns:
        The model in eval mode, and its processor, padding on the left.

    Raises:
        DataError: There is no such folder or hub id, or files are missing from it.
        UnsupportedModelError: The checkpoint is of another class.
        ConfigError: An unknown dtype, device or attention, pixel limits for a family that has none, or no such
            processes.
    """
    check_attention(attn_implementation)
    path = _existing(name_or_path)
    config = _load_config(path)
    family = family_of(config)
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZERS):
        # transformers would make up an empty one.
        raise DataError(f"{path} holds no tokenizer ({', '.join(_TOKENIZERS)}); copy it from the whole checkpoint")
    parallel = ALONE
    if tensor_parallel:
        if device is not None:
            raise ConfigError(
                f"device={str(device)!r}: under tensor parallelism each process has its own; leave it out"
            )
        parallel = join(None if tensor_parallel is True else tensor_parallel)
        check_plan(config, parallel.size)
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, on_cpu=str(device) == "cpu" or (device == "auto" and not torch.cuda.is_available()))
    try:
        # First the small files: a folder without a tokenizer should fail before gigabytes are read.
        processor = family.load_processor(path, min_pixels=min_pixels, max_pixels=max_pixels)
        load = functools.partial(family.load_weights, path, dtype=dtype, attn_implementation=attn_implementation)
        if parallel.size > 1:
            model = divide(load, parallel)
        else:
            model = load(**({"device_map": "auto"} if device == "auto" else {}))
    except OSError as error:
        raise DataError(f"{path} cannot be loaded, a file is missing or unreadable: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"a JSON file in {path} is damaged ({error}); get the whole checkpoint again") from error
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and "optional dependencies" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"the {family.processor_class} of {path} needs a package that is not here: {reason}") from error
    if device != "auto" and parallel.size == 1:
        model = model.to(device)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def _existing(name_or_path: str | os.PathLike[str]) -> str:
    text = os.path.expanduser(os.fspath(name_or_path))
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{text} holds no config.json; give the folder that save_pretrained wrote")
        return text
    looks_like_hub_id = isinstance(name_or_path, str) and text.count("/") == 1 and text[0] not in "./"
    if path.exists() or not looks_like_hub_id:
        raise DataError(f"{text} is no folder; check the path, or give a hub id such as org/name")
    return text


def _load_config(path: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if not Path(path).is_dir():
        reach_hub(path, "config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise DataError(f"{path} is neither a folder here nor a model that the hub serves: {error}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"the configuration of {path} is of no known model type: {error}") from error


def resolve_device(device: str | torch.device | None) -> str | torch.device:
    """`device`, or the default. Raises `ConfigError` for one that torch does not know, or does not see here."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={str(device)!r} is unknown; use cpu, cuda, cuda:1 or auto") from None
    here = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    if wanted.type != "cpu" and (here is None or wanted.type != here.type or (wanted.index or 0) >= count):
        seen = "only the CPU" if here is None else f"the CPU and {count} {here.type} device(s)"
        raise ConfigError(f"device={str(device)!r} is not there: torch sees {seen}; use another, or auto")
    return wanted


def check_attention(name: str) -> None:
    """Raise `ConfigError` unless transformers knows a prefill attention called `name`."""
    from transformers import AttentionInterface

    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known:
        raise ConfigError(f"attn_implementation={name!r} is unknown; use sdpa, eager or flash_attention_2")


def resolve_dtype(dtype: str | torch.dtype | None, *, on_cpu: bool) -> str | torch.dtype:
    """`dtype` as torch knows it, or the default, or "auto". Raises `ConfigError` for a name of no float type."""
    if dtype is None:
        return torch.float32 if on_cpu else torch.bfloat16
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is unknown; use float32, bfloat16, float16 or auto")
    return found

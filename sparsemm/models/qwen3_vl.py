"""Qwen3-VL and its mixture of experts: images and positions as in Qwen2-VL."""

from __future__ import annotations

from sparsemm.models.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen3VLProcessor"


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"
    model_class = "Qwen3VLMoeForConditionalGeneration"


QWEN3_VL, QWEN3_VL_MOE = Qwen3VL(), Qwen3VLMoe()

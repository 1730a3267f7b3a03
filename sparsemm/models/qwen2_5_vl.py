"""Qwen2.5-VL: images and positions as in Qwen2-VL; the model itself undoes the window order of its vision tower."""

from __future__ import annotations

from sparsemm.models.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"
    video_processor_class = "Qwen2VLVideoProcessor"


QWEN2_5_VL = Qwen25VL()

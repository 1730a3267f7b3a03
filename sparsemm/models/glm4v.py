"""GLM-4V: images and positions as in Qwen2-VL."""

from __future__ import annotations

from sparsemm.models.qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    name = "glm4v"
    model_class = "Glm4vForConditionalGeneration"
    processor_class = "Glm4vProcessor"


GLM4V = Glm4v()

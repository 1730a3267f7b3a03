"""Decoding at the speed of memory: one step that nothing on the host decides, replayed from a CUDA graph.

`step.DecodeStep` is the forward of one token, `graph.StepRunner` runs it (captured where there is CUDA, as it is
elsewhere), `loop.DecodeLoop` is what `model.generate` runs in place of its own loop, and `tiling` saves memory on long
prompts.
"""

from sparsemm.decoding.graph import StepRunner, why_no_graph
from sparsemm.decoding.loop import DecodeLoop
from sparsemm.decoding.step import DecodeStep
from sparsemm.decoding.tiling import tiled_prompt

__all__ = ["DecodeLoop", "DecodeStep", "StepRunner", "tiled_prompt", "why_no_graph"]

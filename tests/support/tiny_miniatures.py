"""A miniature small enough to go through the whole curriculum in seconds; as a program, one run of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from sparsemm.miniatures.architectures import DIMENSIONS, Dimensions
from sparsemm.miniatures.batches import Mix
from sparsemm.miniatures.stages import Schedule, Stage
from sparsemm.miniatures.train import Trainer

_PAGES = Mix(14, 14, 1, 2, 1, 0.3)
STAGES = (
    Stage("symbols", "symbols", 3, Mix(4, 9, 1, 1, 1, 0.3), 4),
    Stage("glyphs", "glyphs", 1, replace(_PAGES, field_share=0.0), 4),
    Stage("pages", "pages", 1, _PAGES, 4),
)
SCHEDULE = Schedule(judged_every=1, heldout_pages=1, patience=2, halvings=2, save_seconds=0.0)


def tiny_dims(family: str) -> Dimensions:
    """A model of the family that trains a step in milliseconds; its M-RoPE sections fix head_dim at 32."""
    return replace(
        DIMENSIONS[family],
        num_layers=1,
        hidden_size=64,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2 if family == "llava-vicuna" else 1,
        vision_layers=1,
        vision_size=32,
        vision_heads=2,
        vision_intermediate=32,
    )


def tiny_trainer(family: str, folder: Path) -> Trainer:
    """A run in `folder` that saves after every step; it goes on from the checkpoint there, if there is one."""
    torch.set_num_threads(1)
    trainer = Trainer(family, folder, stages=STAGES, schedule=SCHEDULE, dims=tiny_dims(family))
    if trainer.checkpoint.is_file():
        trainer.load()
    return trainer


if __name__ == "__main__":
    tiny_trainer(sys.argv[1], Path(sys.argv[2])).run()

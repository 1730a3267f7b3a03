"""A calibration of a toy model as a program of its own, to be killed or launched several times."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from toy_models import toy_model, toy_processor

from sparsemm.calibration import calibrate
from sparsemm.documents import TextBox

PAGES = 6


@dataclass
class SlowQuestion:
    """A noise picture that takes a while to open, so that a kill finds the work half done; page 4 is broken."""

    index: int
    seconds: float = 0.0
    prompt: str = "read"

    @property
    def task(self) -> str:
        return "field" if self.index % 3 == 0 else "read"

    @property
    def answer(self) -> str | None:
        return None if self.index == 1 else "abcdef"[: 2 + self.index % 4]

    @property
    def words(self) -> list[TextBox]:
        """Where the answer of a field stands, and another word."""
        return [TextBox("else", (0, 0, 9, 9)), TextBox(self.answer, (12, 4, 36, 20))] if self.task == "field" else []

    @property
    def image(self) -> Image.Image:
        time.sleep(self.seconds)
        if self.index == 4:
            raise OSError("truncated file")
        noise = np.random.default_rng(self.index).integers(0, 256, (30, 40 + 8 * self.index, 3), dtype=np.uint8)
        return Image.fromarray(noise)


def run(output: str | None, seconds: float = 0.0):
    """Calibrate on all pages; `seconds` is how long each takes to open."""
    pages = [SlowQuestion(index, seconds) for index in range(PAGES)]
    return calibrate(
        toy_model("qwen2-vl"), toy_processor("qwen2-vl"), pages, window_size=4, max_new_tokens=6, output=output,
        model_name="toy", dataset="noise", progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], float(sys.argv[2]))

"""A chase of a toy model as a program of its own, to be killed or launched several times: see test_chase_scale.py."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image
from toy_models import toy_model, toy_processor

from sparsemm.chase import chase
from sparsemm.documents.pages import TextBox
from sparsemm.runs.processes import workers

PAGES = 6
OPENED: list[int] = []
"""Pages that this process looked at."""


@dataclass
class SlowPage:
    """A noise picture that takes a while to open, so that a kill finds the work half done; page 4 is broken."""

    index: int
    seconds: float

    @property
    def image(self) -> Image.Image:
        OPENED.append(self.index)
        time.sleep(self.seconds)
        if self.index == 4:
            raise OSError("truncated file")
        noise = np.random.default_rng(self.index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    @property
    def words(self) -> list[TextBox]:
        # Every character in a box of half the page: whatever the random model says matches, and some heads hit.
        return [TextBox("".join(map(chr, range(33, 127))), (0, 0, 39, 20))]


def run(output: str, seconds: float = 0.0) -> None:
    """Chase all pages; `seconds` is how long each takes to open."""
    pages = [SlowPage(index, seconds) for index in range(PAGES)]
    chase(
        toy_model("qwen2-vl"), toy_processor("qwen2-vl"), pages, match="unique", max_new_tokens=6, least_read=0.0,
        output=output, model_name="toy", dataset="noise", progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    run(sys.argv[1], float(sys.argv[2]))
    us = workers()
    print(f"{us.rank}/{us.count}:[{','.join(map(str, OPENED))}]", flush=True)

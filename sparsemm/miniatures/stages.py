"""The curriculum: symbols (the language model alone), glyphs (the vision tower alone), pages (both)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm.miniatures.architectures import DIMENSIONS
from sparsemm.miniatures.batches import Mix


@dataclass(frozen=True)
class Stage:
    """One part of the training; no length is set.

    `kind` "symbols": the language model learns to read pages given as embeddings of their characters; nothing is drawn.
    `kind` "glyphs": the vision tower learns to turn each cell of a page into the embedding of its character.
    `kind` "pages": everything learns, from images.

    The accuracy on held-out pages ends a stage: once it reaches `enough`, or has stopped rising at the last of the
    learning rates, each half of the one before (`Trainer.judge`). `usual_steps` serves the progress bar alone.
    """

    name: str
    kind: str
    batch_size: int
    mix: Mix
    usual_steps: int
    enough: float = 1.0

    @property
    def cells(self) -> int:
        """Cells of a batch's pages: the measure of a step's work."""
        return self.batch_size * self.mix.rows * self.mix.columns


@dataclass(frozen=True)
class Schedule:
    """When a run looks at held-out pages, what they decide, and when it saves.

    It looks every `judged_every` steps at `heldout_pages` pages of each task; after `patience` looks without a better
    one the learning rate is halved, and after so many `halvings` the stage ends. It saves every `save_seconds`.
    """

    judged_every: int = 25
    heldout_pages: int = 32
    patience: int = 8
    halvings: int = 3
    save_seconds: float = 45.0


SCHEDULE = Schedule()
_SYMBOLS = (
    Stage("symbols-small", "symbols", 32, Mix(4, 9, 1, 3, 3, 0.4), 500, enough=0.97),
    Stage("symbols-middle", "symbols", 24, Mix(8, 11, 1, 8, 5, 0.4), 500, enough=0.97),
    Stage("symbols-page", "symbols", 16, Mix(14, 14, 1, 20, 8, 0.4), 1000, enough=0.98),
)
CURRICULUM = (
    *_SYMBOLS,
    Stage("glyphs", "glyphs", 8, Mix(14, 14, 16, 24, field_share=0.0), 2000, enough=0.985),
    Stage("pages", "pages", 16, Mix(14, 14, 1, 20, 8, 0.4), 1500, enough=0.985),
)
_WIDE = Mix(24, 24, 1, 40, 12, 0.4)
WIDE_CURRICULUM = (
    *_SYMBOLS,
    Stage("symbols-wide", "symbols", 8, _WIDE, 1000, enough=0.98),
    Stage("glyphs", "glyphs", 3, Mix(24, 24, 48, 70, field_share=0.0), 2000, enough=0.985),
    Stage("pages", "pages", 8, _WIDE, 1500, enough=0.985),
)


def curriculum(family: str) -> tuple[Stage, ...]:
    """The stages of `family`, whose pages grow to 14 x 14 or to 24 x 24 cells."""
    return WIDE_CURRICULUM if DIMENSIONS[family].page_size == 384 else CURRICULUM

"""The curriculum: glyphs (the vision tower alone), symbols (the language model alone), pages (both)."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsemm.miniatures.batches import Mix


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    `kind` "glyphs": the vision tower learns to turn each cell of a page into the embedding of its character.
    `kind` "symbols": the language model learns to read pages given as those embeddings, with noise; no image is drawn.
    `kind` "pages": everything learns, from images.
    A stage ends after `steps` steps, or as soon as the running training accuracy passes `enough`. The learning rate
    rises over `warmup` steps and, with `decay`, falls linearly to zero. A token of an answer of n tokens weighs
    n ** -`balance`: at 0 all tokens weigh the same, at 1 all answers do. `noise` is the length of the vector added to
    a symbol's embedding, whose own length is 1.
    """

    name: str
    kind: str
    steps: int
    batch_size: int
    mix: Mix = field(default_factory=Mix)
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: bool = False
    enough: float = 1.0
    noise: float = 0.3
    balance: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of `step` (0-based)."""
        factor = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay:
            factor *= max(0.0, 1.0 - step / self.steps)
        return self.learning_rate * factor


CURRICULUM = (
    Stage("symbols-small", "symbols", 3000, 64, Mix(5, 9, 1, 3, 2, 0.2), enough=0.93),
    Stage("symbols-middle", "symbols", 3000, 48, Mix(8, 10, 1, 6, 4, 0.25), enough=0.93),
    Stage("symbols-page", "symbols", 3000, 32, Mix(14, 14, 1, 12, 6, 0.3), enough=0.93),
    Stage(
        "glyphs",
        "glyphs",
        2500,
        8,
        Mix(fewest_words=14, most_words=24, field_share=0.0),
        2e-3,
        decay=True,
        enough=0.985,
    ),
    Stage("pages", "pages", 1000, 24, Mix(14, 14, 1, 8, 6, 0.3), 1e-3),
    # A field's answer is a few tokens of a batch's hundreds: forms need more than their share of pages.
    Stage("forms", "pages", 1000, 24, Mix(14, 14, 1, 8, 6, 0.65), 1e-3, warmup=20, balance=1.0),
    Stage("polish", "pages", 400, 24, Mix(14, 14, 1, 8, 6, 0.5), 1e-3, warmup=1, decay=True, balance=0.5),
)

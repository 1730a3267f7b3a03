"""Trains a miniature.

Every batch is a function of (seed, stage, step), so a resumed run goes on exactly as an undisturbed one.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from sparsemm.errors import DataError
from sparsemm.io import read_json, write_bytes_atomic, write_json_atomic
from sparsemm.miniatures.architectures import Dimensions, build_model
from sparsemm.miniatures.batches import IGNORE, Batch, blank_ids, make_batch
from sparsemm.miniatures.stages import CURRICULUM, Stage
from sparsemm.miniatures.vision import image_embeddings

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 1.0
AVERAGE_DECAY = 0.998
"""Decay a step of the running mean of the weights, which is what gets exported."""


@dataclass
class Progress:
    """Where a run stands: the stage being trained, the steps done in it, and its running training accuracy.

    `history` counts the steps of every stage.
    """

    family: str
    seed: int
    stage: int = 0
    step: int = 0
    accuracy: float = 0.0
    total_steps: int = 0
    seconds: float = 0.0
    history: dict[str, int] = field(default_factory=dict)


class Trainer:
    """One run in `folder`: model, running mean of the weights, optimizer and progress.

    A pages stage starts from the weights that the stages before left; each stage has its own optimizer state.
    """

    def __init__(
        self, family: str, folder: Path, *, seed: int = 0, stages: Sequence[Stage] = CURRICULUM,
        dims: Dimensions | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.stages = tuple(stages)
        self.progress = Progress(family, seed)
        self.model = build_model(family, seed=seed, dims=dims)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer: torch.optim.Optimizer | None = None

    # ---- one step ----------------------------------------------------------------------------------------------

    def _trained(self, kind: str) -> list[torch.nn.Parameter]:
        """The parameters that a stage of `kind` changes. The embedding table is common ground until the pages."""
        language = set(self.model.model.language_model.parameters()) | set(self.model.lm_head.parameters())
        table = self.model.get_input_embeddings().weight
        if kind == "pages":
            return list(self.model.parameters())
        if kind == "symbols":
            return [p for p in self.model.parameters() if p in language and p is not table]
        return [p for p in self.model.parameters() if p not in language]

    def _language_loss(self, batch: Batch, image: torch.Tensor | None, stage: Stage) -> tuple[torch.Tensor, float]:
        """Cross-entropy of the answers' tokens, weighted by the stage's `balance`, and the share that is predicted."""
        embeddings = F.embedding(batch.input_ids, self.model.get_input_embeddings().weight)
        if image is None:  # symbols: the embedding of each cell's character, disturbed as a vision tower would
            image = embeddings[:, batch.image]
            generator = torch.Generator().manual_seed(self.progress.seed * 1_000_003 + self.progress.total_steps)
            spread = stage.noise / image.shape[-1] ** 0.5
            image = image + spread * torch.randn(image.shape, generator=generator)
        embeddings = torch.cat([embeddings[:, : batch.image.start], image, embeddings[:, batch.image.stop :]], dim=1)
        positions = batch.positions[:1]
        if self.progress.family == "qwen2-vl":
            positions = batch.positions[:, None].expand(3, len(embeddings), -1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False
        ).last_hidden_state
        chosen = batch.labels != IGNORE
        logits, targets = self.model.lm_head(hidden[chosen]), batch.labels[chosen]
        lengths = chosen.sum(1, keepdim=True).expand_as(chosen)[chosen]
        weights = lengths.float() ** -stage.balance
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        accuracy = (logits.argmax(-1) == targets).float().mean().item()
        return (losses * weights).sum() / weights.sum(), accuracy

    def _glyph_loss(self, batch: Batch, image: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Names the cells through the tied embedding table, and pulls each embedding onto its character's row.

        Blank cells are most of a page: they and the inked ones weigh the same.
        """
        table = self.model.get_input_embeddings().weight.detach()
        targets = batch.input_ids[:, batch.image]
        inked = ~torch.isin(targets, torch.tensor(blank_ids(self.progress.family)))
        image = image.float()
        logits = image @ table.T * table.shape[1] ** 0.5
        named = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        pulled = (image - table[targets]).square().sum(-1).flatten()
        loss = named + pulled
        mask = inked.flatten()
        hit = logits.argmax(-1) == targets
        return loss[mask].mean() + loss[~mask].mean(), hit[inked].float().mean().item()

    def loss(self, stage: Stage, batch: Batch) -> tuple[torch.Tensor, float]:
        """Loss and accuracy (characters of the answers, or cells named) of one batch, bfloat16 where that is safe."""
        with torch.autocast("cpu", torch.bfloat16):
            image = image_embeddings(self.model, batch.pixels) if stage.kind != "symbols" else None
            if stage.kind == "glyphs":
                return self._glyph_loss(batch, image)
            return self._language_loss(batch, image, stage)

    def step(self, stage: Stage) -> tuple[float, float]:
        """One update; returns its loss and accuracy."""
        state = self.progress
        parameters = self._trained(stage.kind)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(state.step)
        key = (state.seed, state.stage, state.step)
        batch = make_batch(state.family, stage.mix, stage.batch_size, key, draw=stage.kind != "symbols")
        self.model.train()
        loss, accuracy = self.loss(stage, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        # A young average forgets fast, so that it never lags a stage behind.
        decay = min(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return loss.item(), accuracy

    # ---- the run -----------------------------------------------------------------------------------------------

    def run(self, *, log_every: int = 20, save_every: int = 50, max_steps: int | None = None) -> Progress:
        """Trains to the end of the last stage, or for `max_steps` more steps; checkpoints as it goes and at the end."""
        state = self.progress
        done = 0
        clock = time.perf_counter()
        while state.stage < len(self.stages) and (max_steps is None or done < max_steps):
            stage = self.stages[state.stage]
            loss, accuracy = self.step(stage)
            share = max(0.02, 1 / (state.step + 1))
            state.accuracy += share * (accuracy - state.accuracy)
            state.step += 1
            state.total_steps += 1
            state.history[stage.name] = state.history.get(stage.name, 0) + 1
            done += 1
            state.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            ended = state.step >= stage.steps or (state.accuracy >= stage.enough and state.step >= 50)
            if state.step % log_every == 0 or ended:
                logger.info(
                    "%s %s %d/%d: loss %.3f, accuracy %.3f (mean %.3f), held out %.3f, %.0f s",
                    state.family, stage.name, state.step, stage.steps, loss, accuracy, state.accuracy,
                    self.heldout_accuracy(stage), state.seconds,
                )  # fmt: skip
            if ended:
                state.stage, state.step, state.accuracy = state.stage + 1, 0, 0.0
                self.optimizer = None
            if ended or state.step % save_every == 0:
                self.save()
        self.save()
        return state

    @torch.no_grad()
    def heldout_accuracy(self, stage: Stage) -> float:
        """Accuracy on one fixed batch of held-out pages (teacher-forced for language)."""
        self.model.eval()
        batch = make_batch(
            self.progress.family, stage.mix, 16, (7, 7, 7), split="heldout", draw=stage.kind != "symbols"
        )
        return self.loss(stage, batch)[1]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes weights, running mean, optimizer and progress; the progress names the files that belong to it."""
        from safetensors.torch import save

        weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters()}
        tensors = {f"model.{k}": v for k, v in weights.items()} | {f"average.{k}": v for k, v in self.average.items()}
        number = self.progress.total_steps
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict() if self.optimizer else None, buffer)
        write_bytes_atomic(self.folder / f"step-{number}.safetensors", save(tensors))
        write_bytes_atomic(self.folder / f"step-{number}.optimizer.pt", buffer.getvalue())
        write_json_atomic(self.folder / "progress.json", asdict(self.progress))
        for old in self.folder.glob("step-*"):
            if not old.name.startswith(f"step-{number}."):
                old.unlink()

    def load(self) -> None:
        """Continues from the folder's checkpoint. Raises `DataError` when there is none, or it is of another run."""
        from safetensors.torch import load_file

        stored = Progress(**read_json(self.folder / "progress.json"))
        if (stored.family, stored.seed) != (self.progress.family, self.progress.seed):
            raise DataError(
                f"{self.folder} holds a run of {stored.family} with seed {stored.seed}, not of {self.progress.family} "
                f"with seed {self.progress.seed}; choose another folder"
            )
        tensors = load_file(self.folder / f"step-{stored.total_steps}.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        optimizer = torch.load(self.folder / f"step-{stored.total_steps}.optimizer.pt", weights_only=True)
        self.progress = stored
        if optimizer is not None:
            kind = self.stages[stored.stage].kind
            self.optimizer = torch.optim.AdamW(self._trained(kind), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
            self.optimizer.load_state_dict(optimizer)


def train(
    family: str, *, folder: str | Path | None = None, seed: int = 0, resume: bool = False,
    save_every: int = 50,
) -> Path:  # fmt: skip
    """Trains `family` through the curriculum, checkpointing in `folder` (default `runs/miniatures/<family>`).

    Returns the folder. Raises `DataError` when it already holds a run and `resume` is False.
    """
    target = Path(folder) if folder is not None else Path("runs/miniatures") / family
    trainer = Trainer(family, target, seed=seed)
    if (target / "progress.json").is_file():
        if not resume:
            raise DataError(f"{target} already holds a run; continue it with --resume or choose another folder")
        trainer.load()
    trainer.run(save_every=save_every)
    return target

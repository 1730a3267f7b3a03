"""Trains a miniature from nothing, stage after stage, and goes on after an interruption as if there had been none.

A batch is a function of (seed, stage, step); the checkpoint is one file with all else that the next step depends on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from operator import mul
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsemm.errors import DataError
from sparsemm.io import write_bytes_atomic
from sparsemm.miniatures.architectures import Dimensions, build_model, check_family
from sparsemm.miniatures.batches import Batch, make_batch
from sparsemm.miniatures.losses import ATTENTION, loss
from sparsemm.miniatures.stages import SCHEDULE, Schedule, Stage, curriculum

logger = logging.getLogger(__name__)

LEARNING_RATE = 2e-3
WARMUP = 50
"""Steps over which the learning rate rises at the beginning of a stage."""
GRADIENT_CLIP = 1.0
AVERAGE_DECAY = 0.99
"""Decay a step of the running mean of the weights, which is what is judged and exported."""


@dataclass
class Progress:
    """Where a run stands: its stage, the steps done in it, how it was judged, and the steps of every stage so far.

    `stale` counts the looks at held-out pages since the `best`, `seconds` those of the processor. `curve` has (stage,
    steps of all stages, minutes, held-out accuracy) of every look.
    """

    family: str
    seed: int
    threads: int
    stage: int = 0
    step: int = 0
    best: float = 0.0
    stale: int = 0
    halvings: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    history: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[str, int, float, float]] = field(default_factory=list)


@lru_cache(maxsize=1)
def heldout_batches(family: str, stage: Stage, pages: int) -> tuple[Batch, ...]:
    """The fixed held-out pages that `stage` is judged by: `pages` texts, and as many forms where it has forms."""
    shares = (0.0, 1.0) if stage.mix.field_share else (0.0,)
    mixes = [replace(stage.mix, field_share=share) for share in shares]
    draw = stage.kind != "symbols"
    return tuple(make_batch(family, mix, pages, (7, 7, 7), split="heldout", draw=draw) for mix in mixes)


class Trainer:
    """One run in `folder`: model, running mean of the weights, optimizers (new for each stage) and progress."""

    def __init__(
        self, family: str, folder: Path, *, seed: int = 0, threads: int = 1, stages: Sequence[Stage] | None = None,
        schedule: Schedule = SCHEDULE, dims: Dimensions | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint = folder / "checkpoint.safetensors"
        self.stages, self.schedule = tuple(stages or curriculum(check_family(family))), schedule
        self.progress = Progress(family, seed, threads)
        self.model = build_model(family, seed=seed, dims=dims)
        self.model.set_attn_implementation(ATTENTION)
        self.model.get_input_embeddings().weight.requires_grad_(False)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._begin_stage()

    @property
    def stage(self) -> Stage | None:
        """The stage under way; None after the last."""
        return self.stages[self.progress.stage] if self.progress.stage < len(self.stages) else None

    def _begin_stage(self) -> None:
        """Optimizers for what the stage trains: Muon for the linear layers, AdamW for the rest.

        The embedding table, which names the characters to both halves, is never changed.
        """
        self.trained: list[nn.Parameter] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.stage is None:
            return
        language = set(self.model.model.language_model.parameters())
        left_out = {"symbols": set(self.model.parameters()) - language, "glyphs": language, "pages": set()}
        self.trained = [p for p in self.model.parameters() if p.requires_grad and p not in left_out[self.stage.kind]]
        linear = {module.weight for module in self.model.modules() if isinstance(module, nn.Linear)}
        matrices = [p for p in self.trained if p in linear]
        others = [p for p in self.trained if p not in linear]
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05, fused=True),
        ]

    # ---- one step ----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`losses.loss` of a batch of the stage under way."""
        # Symbols are disturbed in another way at every step.
        generator = torch.Generator().manual_seed(self.progress.seed * 1_000_003 + self.progress.total_steps)
        return loss(self.model, self.stage.kind, batch, generator)

    def step(self) -> float:
        """One update; returns its loss."""
        state, stage = self.progress, self.stage
        key = (state.seed, state.stage, state.step)
        batch = make_batch(state.family, stage.mix, stage.batch_size, key, draw=stage.kind != "symbols")
        value, _ = self.loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(self.trained, GRADIENT_CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (state.step + 1) / WARMUP) * 0.5**state.halvings
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        # A young average forgets fast, so that it never lags a stage behind.
        decay = min(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        state.step += 1
        state.total_steps += 1
        state.history[stage.name] = state.step
        return value.item()

    # ---- the run -----------------------------------------------------------------------------------------------

    @contextmanager
    def mean_weights(self) -> Iterator[None]:
        """The model has the running mean of its weights while the context lasts."""
        own = {name: p.data for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.data = self.average[name]
        try:
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = own[name]

    @torch.no_grad()
    def heldout_accuracy(self) -> float:
        """Teacher-forced accuracy of the mean weights on held-out pages: that of the task which is read worse."""
        batches = heldout_batches(self.progress.family, self.stage, self.schedule.heldout_pages)
        with self.mean_weights():
            return min(self.loss(batch)[1].float().mean().item() for batch in batches)

    def judge(self) -> None:
        """Looks at held-out pages: halves the learning rate, or ends the stage, when they say so."""
        state, stage = self.progress, self.stage
        accuracy = self.heldout_accuracy()
        state.curve.append((stage.name, state.total_steps, round(state.seconds / 60, 2), round(accuracy, 4)))
        state.stale = 0 if accuracy > state.best else state.stale + 1
        state.best = max(state.best, accuracy)
        if state.stale == self.schedule.patience:
            state.stale, state.halvings = 0, state.halvings + 1
        if accuracy >= stage.enough or state.halvings == self.schedule.halvings:
            state.stage, state.step, state.best, state.stale, state.halvings = state.stage + 1, 0, 0.0, 0, 0
            self._begin_stage()

    def run(self, *, steps: int | None = None, progress: bool = False) -> None:
        """Trains to the end of the last stage, or for `steps` more steps; saves as it goes and at the end.

        `progress` shows a bar; its end is a guess from other runs, since held-out pages decide.
        """
        from tqdm import tqdm

        state = self.progress
        last = None if steps is None else state.total_steps + steps
        saved, clock = time.monotonic(), time.process_time()
        done, to_come = self._cells()
        bar = tqdm(initial=done, total=done + to_come, disable=not progress, unit="cell", unit_scale=True)
        while self.stage is not None and state.total_steps != last:
            bar.set_description(self.stage.name, refresh=False)
            value = self.step()
            state.seconds, clock = state.seconds + time.process_time() - clock, time.process_time()
            if state.step % self.schedule.judged_every == 0:
                self.judge()
                stage, total, minutes, accuracy = state.curve[-1]
                logger.info("%s: %d steps, %.1f min, loss %.3f, held out %.4f", stage, total, minutes, value, accuracy)
                bar.set_postfix_str(f"held out {accuracy:.3f}", refresh=False)
            if time.monotonic() - saved > self.schedule.save_seconds:
                self.save()
                saved = time.monotonic()
            done, to_come = self._cells()
            bar.total = done + to_come
            bar.update(done - bar.n)
        bar.close()
        self.save()

    def _cells(self) -> tuple[int, int]:
        """Cells of the pages read so far, and of those that other runs would still read."""
        counts = [self.progress.history.get(stage.name, 0) for stage in self.stages]
        to_come = [max(0, stage.usual_steps - count) for stage, count in zip(self.stages, counts, strict=True)]
        to_come[: self.progress.stage] = [0] * self.progress.stage
        cells = [stage.cells for stage in self.stages]
        return sum(map(mul, counts, cells)), sum(map(mul, to_come, cells))

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, running mean and optimizer states, by names that end in the parameter's."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states = [item for optimizer in self.optimizers for item in optimizer.state.items()]
        for parameter, name in names.items():
            yield f"model.{name}", parameter.detach()
            yield f"average.{name}", self.average[name]
        for parameter, state in states:
            for key, value in state.items():
                yield f"{key}.{names[parameter]}", value

    def save(self) -> None:
        """Writes all of `_tensors` and the progress, in one file."""
        from safetensors.torch import save

        tensors = {name: value.contiguous() for name, value in self._tensors()}
        write_bytes_atomic(self.checkpoint, save(tensors, {"progress": json.dumps(asdict(self.progress))}))

    def load(self) -> None:
        """Goes on from the folder's checkpoint. Raises `DataError` when it is of another run, or none."""
        from safetensors import SafetensorError, safe_open

        other = "choose another folder, or --fresh"
        try:
            with safe_open(self.checkpoint, "pt") as file:
                stored = Progress(**json.loads((file.metadata() or {})["progress"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.checkpoint} is no checkpoint of a training ({error}); {other}") from error
        for name in ("family", "seed", "threads"):
            if (there := getattr(stored, name)) != (here := getattr(self.progress, name)):
                raise DataError(f"{self.checkpoint} is of a run with {name} {there}, not {here}; {other}")
        named = {f"{part}.{name}" for name, _ in self.model.named_parameters() for part in ("model", "average")}
        if missing := sorted(named - tensors.keys()):
            raise DataError(f"{self.checkpoint} has no {missing[0]}; {other}")
        self.progress = stored
        self._begin_stage()
        parameters = dict(self.model.named_parameters())
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part == "model":
                parameters[name].data.copy_(value)
            elif part == "average":
                self.average[name] = value
            else:
                owners[parameters[name]].state[parameters[name]][part] = value


def train(
    family: str, folder: Path, *, seed: int = 0, threads: int = 1, steps: int | None = None, fresh: bool = False,
    progress: bool = False,
) -> Trainer:  # fmt: skip
    """Trains `family` from nothing, or goes on from the checkpoint in `folder` unless `fresh`.

    The result depends on `seed` and on the number of `threads` (which order sums are taken in), never on
    interruptions or on `steps`, after which this run ends. Returns the trainer; its `stage` is None when all is done.
    Raises `DataError` when the folder holds another run.
    """
    torch.set_num_threads(threads)
    trainer = Trainer(family, folder, seed=seed, threads=threads)
    if trainer.checkpoint.is_file() and not fresh:
        trainer.load()
    trainer.run(steps=steps, progress=progress)
    return trainer

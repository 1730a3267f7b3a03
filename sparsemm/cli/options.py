"""The options that several commands share, declared once, and what is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    LARGE,
    MINIATURES,
    SMALL,
    WIDE,
    Defaults,
    defaults_of,
    is_miniature,
    listed,
    load,
    parse_integers,
    parse_list,
    resolve_model,
    score_files,
    short_name,
)
from sparsemm.errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm import CompressionConfig, HeadScores
    from sparsemm.documents import Page
    from sparsemm.models.identity import Identity

Rounding = Literal["exact", "paper"]
Metric = Literal["accuracy", "exact_match", "anls"]

ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, hub id, or a miniature: " + ", ".join(MINIATURES) + ".")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto [default: cuda where there is one].")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 [default: bfloat16 on a GPU, float32 on the CPU].")
]
MethodOption = Annotated[str, typer.Option(help="fullkv, snapkv, pyramidkv, adakv, sparsemm, random, mask, …")]
MethodsOption = Annotated[str, typer.Option(help="Names separated by commas or spaces, or all.")]
BudgetOption = Annotated[int | None, typer.Option(min=1, help="Mean prompt rows kept per kv head, window included.")]
MaskModeOption = Annotated[
    Literal["zero_query", "zero_output"], typer.Option(help="Masked heads average all values, or contribute nothing.")
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
PixelsOption = Annotated[int | None, typer.Option(min=1, help="Largest image area, where sizes are free.")]
BackendOption = Annotated[
    str, typer.Option(help="Who attends to cached rows: auto, cuda, fa3, flash_attn, torch_varlen, cpu, reference.")
]
GraphOption = Annotated[bool | None, typer.Option("--graph/--no-graph", help="CUDA graphs [default: where possible].")]
AnyScoresOption = Annotated[
    bool, typer.Option("--any-head-scores", help="Take scores that were chased on another model.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over: forget what the output holds already.")]
QuietOption = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
FormatOption = Annotated[
    Literal["svg", "pdf"] | None, typer.Option("--format", help="Also write it so, beside the PNG: svg or pdf.")
]
JsonOption = Annotated[Path | None, typer.Option(help="JSON file of the figures [default: none].")]


@dataclass(frozen=True)
class Model:
    """Which checkpoint, where, and how precisely."""

    model: ModelOption = DEFAULT_MODEL
    device: DeviceOption = None
    dtype: DtypeOption = None
    processes: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """Names results and score files."""
        return short_name(self.model)

    @property
    def is_miniature(self) -> bool:
        return is_miniature(self.model)

    @property
    def defaults(self) -> Defaults:
        return defaults_of(self.model)

    def load(self, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model and its processor; `options` of `sparsemm.load_model`, those that are None left out."""
        given = {"device": self.device, "dtype": self.dtype, **options}
        if self.processes > 1:
            given["tensor_parallel"] = self.processes
        try:
            return load(self.model, **{name: value for name, value in given.items() if value is not None})
        except (DataError, UnsupportedModelError) as error:
            raise type(error)(f"--model: {error}") from error


@dataclass(frozen=True)
class DividedModel(Model):
    """A checkpoint that several processes may hold together."""

    tensor_parallel: Annotated[
        int,
        typer.Option(min=1, help="Processes (GPUs) that divide every layer; started here, or already by torchrun."),
    ] = 1

    @property
    def processes(self) -> int:
        """How many run the command together."""
        return self.tensor_parallel


@dataclass(frozen=True)
class Scores:
    """Where the head scores come from."""

    head_scores: Annotated[
        Path | None,
        typer.Option(help="Head-score file [default: the checkpoint's head_scores.json, or head_scores/<model>.json]."),
    ] = None
    any_head_scores: AnyScoresOption = False

    def file(self, model: str, *, calibrated: bool = False) -> Path | None:
        """The file given, else the first that is there of those where the model's are looked for, else None.

        Plain scores that are given are no calibration; that of the model is looked for all the same.
        """
        from sparsemm import HeadScores

        if self.head_scores is not None and not (calibrated and HeadScores.load(self.head_scores).curves is None):
            return self.head_scores
        return next((file for file in score_files(model, calibrated=calibrated) if file.is_file()), None)

    def table(self, model: str, *, calibrated: bool = False) -> HeadScores:
        """The scores, or the calibration, with one line on standard error that says which.

        Raises:
            DataError: There are none of the model.
            HeadScoreError: The file is no score file, or one of another model.
        """
        found = self.find(model, calibrated=calibrated)
        if found is None:
            places = " or ".join(map(str, score_files(model, calibrated=calibrated)))
            kind, command = ("is no calibration", "calibrate") if calibrated else ("are no head scores", "chase")
            given = "" if self.head_scores is None else f"{self.head_scores} holds plain scores, and "
            raise DataError(
                f"{given}there {kind} of {short_name(model)} in {places}; "
                f"let `sparsemm {command} --model {model}` make some, or give --head-scores"
            )
        return found

    def find(self, model: str, *, calibrated: bool = False) -> HeadScores | None:
        """As `table`, but None where there are none."""
        from sparsemm.models.identity import checkpoint_identity

        file = self.file(model, calibrated=calibrated)
        if file is None:
            return None
        return load_scores(file, checkpoint_identity(resolve_model(model)), any_model=self.any_head_scores)


def usable_methods(
    methods: Sequence[str], scores: HeadScores | None, calibration: HeadScores | None = None
) -> list[str]:
    """Those of `methods` that can run; what is left out for want of scores is said on standard error."""
    from sparsemm.methods import get_method

    kinds = {name: get_method(name).head_scores for name in methods}
    curves = None if calibration is None else calibration.curves
    again = "{}; `sparsemm calibrate --fresh` makes them"
    for kind, found, what in (
        ("given", scores, "head scores: {}; `sparsemm chase` makes them"),
        ("calibrated", calibration, "a calibration: {}; `sparsemm calibrate` makes one"),
        ("calibrated_mixkv", curves and curves.distortions_mixkv, f"curves of MixKV's ranking: {again}"),
        ("retrieval", curves and curves.retrieval, f"retrieval scores: {again}"),
    ):
        left_out = [name for name in methods if kinds.get(name) == kind and found is None]
        if left_out:
            typer.echo(f"left out for want of {what.format(', '.join(left_out))}", err=True)
        kinds = {name: each for name, each in kinds.items() if name not in left_out}
    return list(kinds)


def load_scores(file: Path, model: Identity | None = None, *, any_model: bool = False) -> HeadScores:
    """A score file, checked against the model it is used with, and said in one line on standard error.

    Raises:
        HeadScoreError: It is no score file, or one of another model, and `any_model` is off.
    """
    from sparsemm import HeadScores

    table = HeadScores.load(file, any_model=any_model)
    notice = None if model is None else table.check_model(model)
    known = table.provenance
    parts = [known.get("model") or "unknown model"]
    parts += [f"{known[f'num_{unit}']} {unit}" for unit in ("images", "pages") if f"num_{unit}" in known]
    parts += [f"match rule {known['match_rule']}"] if "match_rule" in known else []
    typer.echo(f"head scores: {file} ({', '.join(parts)})" + (f"; {notice}" if notice else ""), err=True)
    return table


@dataclass(frozen=True)
class Settings(Scores):
    """The settings of a compression, all but method and budget."""

    window_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Last prompt tokens, always kept [default: {LARGE.window_size}, miniatures {SMALL.window_size} or "
            f"{WIDE.window_size}].",
        ),
    ] = None
    ratio: Annotated[float, typer.Option(help="Share of the budget beyond the window that all heads get alike.")] = 0.1
    rounding: Annotated[
        Rounding, typer.Option(help="exact keeps the whole budget; paper is the release's rounding.")
    ] = "exact"
    mask_ratio: Annotated[float, typer.Option(help="Share of heads that mask and mask_random mask.")] = 0.1
    mask_mode: MaskModeOption = "zero_query"
    seed: Annotated[int, typer.Option(help="Seed of random heads, and of sampling.")] = 0

    def fields(self, model: str) -> dict[str, Any]:
        """Fields of `CompressionConfig`, with the window that suits the model; without method, budget and scores."""
        own = dataclasses.fields(Settings)[len(dataclasses.fields(Scores)) :]
        values = {field.name: getattr(self, field.name) for field in own}
        if values["window_size"] is None:
            values["window_size"] = defaults_of(model).window_size
        return values

    def config(
        self, model: str, method: str, budget: int | None, scores: HeadScores | None = None
    ) -> CompressionConfig:
        """The whole configuration: head scores where the method needs them, by default `table`; a budget likewise."""
        from sparsemm import CompressionConfig
        from sparsemm.methods import get_method

        chosen = get_method(method)
        calibrated = chosen.needs_calibration
        if not chosen.needs_head_scores:
            scores = None
        elif scores is None or (calibrated and scores.curves is None):
            scores = self.table(model, calibrated=calibrated)
        return CompressionConfig(
            method=method,
            budget=budget if chosen.compresses else None,
            head_scores=scores,
            **self.fields(model),
        )


@dataclass(frozen=True)
class Reading:
    """Which held-out pages an experiment reads, and how."""

    documents: Annotated[int, typer.Option(min=1, help="Number of held-out pages.")] = 64
    tasks: Annotated[str, typer.Option(help="read (all words of a page), field (one value of a form).")] = "read,field"
    num_words: Annotated[
        str | None,
        typer.Option(help=f"Words of a page, taking turns [default: {listed(LARGE.num_words)}, or what suits it]."),
    ] = None
    page_size: Annotated[
        int | None, typer.Option(help="Side of a page in pixels, a multiple of 16 [default: 224, or the miniature's].")
    ] = None
    page_seed: Annotated[int, typer.Option(help="Another seed draws other pages.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Pages generated together.")] = 16
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer [default: 48, or what the pages' answers take].")
    ] = None
    fresh: FreshOption = False
    no_progress: QuietOption = False

    def pages(self, model: Model) -> list[Page]:
        """The pages, by default such as suit `model`."""
        from sparsemm.experiments.session import heldout_pages

        suits = model.defaults
        words = suits.num_words if self.num_words is None else parse_integers(self.num_words, "--num-words")
        size = suits.page_size if self.page_size is None else self.page_size
        return heldout_pages(
            self.documents, tasks=parse_list(self.tasks), num_words=words, seed=self.page_seed, size=size
        )

    @property
    def how(self) -> dict[str, Any]:
        """What every experiment takes beside its pages, as arguments."""
        return {
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "fresh": self.fresh,
            "progress": not self.no_progress,
        }

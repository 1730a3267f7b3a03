"""The options that several commands share, declared once, and what is made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    MINIATURE_WINDOW,
    MINIATURES,
    find_head_scores,
    is_miniature,
    load,
    parse_integers,
    parse_list,
    short_name,
)
from sparsemm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm import CompressionConfig, HeadScores
    from sparsemm.documents import Page

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
PixelsOption = Annotated[int | None, typer.Option(min=1, help="Largest image area (Qwen2-VL).")]
BackendOption = Annotated[
    str, typer.Option(help="Who attends to cached rows: auto, cuda, fa3, flash_attn, torch_varlen, cpu, reference.")
]
GraphOption = Annotated[bool | None, typer.Option("--graph/--no-graph", help="CUDA graphs [default: where possible].")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over: forget what the output holds already.")]
QuietOption = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
JsonOption = Annotated[Path | None, typer.Option(help="JSON file of the figures [default: none].")]


@dataclass(frozen=True)
class Model:
    """Which checkpoint, where, and how precisely."""

    model: ModelOption = DEFAULT_MODEL
    device: DeviceOption = None
    dtype: DtypeOption = None

    @property
    def name(self) -> str:
        """Names results and score files."""
        return short_name(self.model)

    @property
    def is_miniature(self) -> bool:
        return is_miniature(self.model)

    def load(self, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model and its processor; `options` of `sparsemm.load_model`, those that are None left out."""
        given = {"device": self.device, "dtype": self.dtype, **options}
        return load(self.model, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Scores:
    """Where the head scores come from."""

    head_scores: Annotated[
        Path | None,
        typer.Option(help="Head-score file [default: head_scores/<name of the model>.json, if it is there]."),
    ] = None

    def find(self, model: str) -> Path | None:
        """The file given, else that of the model, else None."""
        return find_head_scores(model, self.head_scores)

    def table(self, model: str) -> HeadScores:
        """The scores. Raises `DataError` when there are none of the model."""
        from sparsemm import HeadScores

        file = self.find(model)
        if file is None:
            raise DataError(f"there are no head scores of {short_name(model)}; chase them, or give --head-scores")
        return HeadScores.load(file)


@dataclass(frozen=True)
class Settings(Scores):
    """The settings of a compression, all but method and budget."""

    window_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Last prompt tokens, always kept [default: 32, miniatures {MINIATURE_WINDOW}]."),
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
        names = {field.name for field in dataclasses.fields(Settings)} - {
            field.name for field in dataclasses.fields(Scores)
        }
        values = {name: getattr(self, name) for name in names}
        if values["window_size"] is None:
            values["window_size"] = MINIATURE_WINDOW if is_miniature(model) else 32
        return values

    def config(self, model: str, method: str, budget: int | None) -> CompressionConfig:
        """The whole configuration, with head scores where the method needs them, a budget where it has one."""
        from sparsemm import CompressionConfig
        from sparsemm.methods import get_method

        chosen = get_method(method)
        return CompressionConfig(
            method=method,
            budget=budget if chosen.compresses else None,
            head_scores=self.find(model) if chosen.head_scores == "given" else None,
            **self.fields(model),
        )


@dataclass(frozen=True)
class Reading:
    """Which held-out pages an experiment reads, and how."""

    documents: Annotated[int, typer.Option(min=1, help="Number of held-out pages.")] = 64
    tasks: Annotated[str, typer.Option(help="read (all words of a page), field (one value of a form).")] = "read,field"
    num_words: Annotated[str, typer.Option(help="Words of a page, taking turns.")] = "1,2,3,4"
    page_seed: Annotated[int, typer.Option(help="Another seed draws other pages.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Pages generated together.")] = 16
    max_new_tokens: NewTokensOption = 48
    fresh: FreshOption = False
    no_progress: QuietOption = False

    def pages(self, **options: Any) -> list[Page]:
        """The pages; `options` of `heldout_pages`."""
        from sparsemm.experiments.session import heldout_pages

        words = parse_integers(self.num_words, "--num-words")
        return heldout_pages(
            self.documents, tasks=parse_list(self.tasks), num_words=words, seed=self.page_seed, **options
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

"""What the commands share: names of models and of their score files, lists of values, options."""

from __future__ import annotations

import logging
import os
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sparsemm
from sparsemm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm.documents import Page

DEFAULT_MODEL = "llava-vicuna"
MINIATURES = ("llava-vicuna", "llava-mistral", "qwen2-vl")
MINIATURE_WINDOW = 4  # 32 prompt tokens would be a seventh of a miniature's page


class Rounding(str, Enum):
    """How real-valued budgets become whole rows."""

    exact = "exact"
    paper = "paper"


class MaskMode(str, Enum):
    """What masking a head does."""

    zero_query = "zero_query"
    zero_output = "zero_output"


ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, hub id, or a miniature: " + ", ".join(MINIATURES) + ".")
]
HeadScoresOption = Annotated[
    Path | None, typer.Option(help="Head-score file; by default head_scores/<name of the model>.json if it is there.")
]
WindowOption = Annotated[
    int | None, typer.Option(help=f"Last prompt tokens, always kept [default: 32, miniatures {MINIATURE_WINDOW}].")
]
RatioOption = Annotated[float, typer.Option(help="Share of the budget beyond the window that all heads get alike.")]
RoundingOption = Annotated[
    Rounding, typer.Option(help="exact keeps the whole budget; paper is the release's rounding.")
]
MaskRatioOption = Annotated[float, typer.Option(help="Share of heads that mask and mask_random mask.")]
MaskModeOption = Annotated[MaskMode, typer.Option(help="Masked heads average all values, or contribute nothing.")]
SeedOption = Annotated[int, typer.Option(help="Seed of random heads.")]
DocumentsOption = Annotated[int, typer.Option(min=1, help="Number of held-out pages.")]
TasksOption = Annotated[str, typer.Option(help="read (all words of a page), field (one value of a form).")]
WordsOption = Annotated[str, typer.Option(help="Words of a page, taking turns.")]
PageSeedOption = Annotated[int, typer.Option(help="Another seed draws other pages.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Pages generated together.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Measure again what the output holds already.")]
QuietOption = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto [default: cuda where there is one].")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 [default: bfloat16 on a GPU, float32 on the CPU].")
]


def checkout() -> Path:
    """The repository this package runs from; miniatures and score files lie in it."""
    return Path(sparsemm.__file__).resolve().parent.parent


def resolve_model(name: str) -> str:
    """The folder of a miniature given by its short name; any other name as it is.

    Raises:
        DataError: A miniature is asked for that is not in the checkout.
    """
    if name not in MINIATURES or Path(name).is_dir():
        return name
    folder = checkout() / "assets" / "miniatures" / name
    if not (folder / "config.json").is_file():
        raise DataError(
            f"the miniature {name!r} is not in {folder.parent}; train it with "
            f"`sparsemm miniatures train --family {name}`, or give another --model"
        )
    return str(folder)


def short_name(model: str) -> str:
    """Last part of a path or hub id: names results and score files."""
    return Path(model).name


def is_miniature(model: str) -> bool:
    """Whether a name, or the folder it resolved to, is one of the repository's miniatures."""
    return model in MINIATURES or Path(model).resolve().parent == checkout() / "assets" / "miniatures"


def find_head_scores(model: str, given: Path | None) -> Path | None:
    """`given`, else the model's file in the current folder's or the checkout's `head_scores/`, else None."""
    if given is not None:
        return given
    name = f"{short_name(model)}.json"
    for folder in (Path("head_scores"), checkout() / "head_scores"):
        if (folder / name).is_file():
            return folder / name
    return None


def window_for(model: str, given: int | None) -> int:
    """`given`, else the default for the model: 32, for miniatures 4."""
    if given is not None:
        return given
    return MINIATURE_WINDOW if is_miniature(model) else 32


def parse_list(text: str) -> list[str]:
    """Values separated by commas or spaces."""
    return [part for part in re.split(r"[,\s]+", text) if part]


def parse_integers(text: str, name: str) -> list[int]:
    """Whole numbers separated by commas or spaces. Raises `ConfigError` naming the one that is none."""
    values = []
    for part in parse_list(text):
        try:
            values.append(int(part))
        except ValueError:
            raise ConfigError(f"{name} holds {part!r}; give whole numbers separated by commas") from None
    return values


def pages_for(documents: int, tasks: str, num_words: str, page_seed: int, **options: Any) -> list[Page]:
    """The held-out pages that the options of an experiment ask for; `options` go on to `heldout_pages`."""
    from sparsemm.experiments.session import heldout_pages

    words = parse_integers(num_words, "--num-words")
    return heldout_pages(documents, tasks=parse_list(tasks), num_words=words, seed=page_seed, **options)


def quiet(verbose: bool) -> None:
    """Log warnings only, or everything of this package; loading prints no bars of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if verbose:
        logging.getLogger("sparsemm").setLevel(logging.INFO)


def load(
    model: str, *, device: str | None, dtype: str | None, **options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """`sparsemm.load_model` of a resolved name, without transformers' loading bars."""
    path = resolve_model(model)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return sparsemm.load_model(path, device=device, dtype=dtype, **options)

"""What the commands share besides options: names of models and of their score files, lists of values, loading."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import sparsemm
from sparsemm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DEFAULT_MODEL = "llava-vicuna"


@dataclass(frozen=True)
class Defaults:
    """What suits a model where no option says it: the paper's settings, or a miniature's."""

    window_size: int = 32
    budget: int = 256
    budgets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # Table 3 of the paper
    masked_heads: tuple[int, ...] | None = None
    page_size: int = 224
    num_words: tuple[int, ...] = (1, 2, 3, 4)


LARGE = Defaults()
# A window of 32 would be a seventh of a miniature's page.
SMALL = Defaults(window_size=4, budget=128, budgets=(8, 12, 16, 24, 32, 64, 128), masked_heads=(0, 1, 2, 3, 4, 6, 8))
WIDE = Defaults(
    window_size=16, budget=192, budgets=(32, 48, 64, 96, 128, 192), masked_heads=(0, 1, 4, 6, 9, 19), page_size=384,
    num_words=(2, 4, 8, 12),
)  # fmt: skip
MINIATURES = {**dict.fromkeys(("llava-vicuna", "llava-mistral", "qwen2-vl", "qwen3-vl"), SMALL), "qwen3-vl-wide": WIDE}


def defaults_of(model: str) -> Defaults:
    """What suits the model of this name or folder."""
    return MINIATURES.get(short_name(model), SMALL) if is_miniature(model) else LARGE


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
    return Path(model).resolve().name if Path(model).is_dir() else Path(model).name


def is_miniature(model: str) -> bool:
    """Whether a name, or the folder it resolved to, is one of the repository's miniatures."""
    return model in MINIATURES or Path(model).resolve().parent == checkout() / "assets" / "miniatures"


def score_files(model: str, *, calibrated: bool = False) -> list[Path]:
    """Where the head scores of a model are looked for, in order; the first of them that can be is where chases write.

    A local checkpoint's lie in its folder, those of a miniature or a hub id in the checkout's `head_scores/`, under the
    last part of the name. So do calibrations, as `calibration.json` and in `head_scores/calibrations/`.
    """
    folder = checkout() / "head_scores" / ("calibrations" if calibrated else "")
    named = folder / f"{short_name(model)}.json"
    if is_miniature(model) or not Path(model).is_dir():
        return [named]
    return [Path(model) / ("calibration.json" if calibrated else "head_scores.json"), named]


def file_name(*parts: object) -> str:
    """The parts of a name that are not None, with nothing in them that a file could not be called by."""
    texts = (re.sub(r"[^\w.-]+", "_", str(part)).strip("_")[:40] for part in parts if part is not None)
    return "-".join(texts)


def parse_list(text: str, name: str | None = None) -> list[str]:
    """Values separated by commas or spaces. Raises `ConfigError` where option `name` is given none."""
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    if name is not None and not parts:
        raise ConfigError(f"{name} is empty; give values separated by commas")
    return parts


def listed(values: Iterable[int]) -> str:
    """Values as a user gives them: with commas between."""
    return ",".join(map(str, values))


def parse_integers(text: str, name: str) -> list[int]:
    """Whole numbers separated by commas or spaces. Raises `ConfigError` naming the one that is none."""
    values = []
    for part in parse_list(text):
        try:
            values.append(int(part))
        except ValueError:
            raise ConfigError(f"{name} holds {part!r}; give whole numbers separated by commas") from None
    return values


def warn_of_positions(model: PreTrainedModel, tokens: int) -> None:
    """Say on standard error that so many tokens are more than the model was made for, if they are."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is not None and tokens > known:
        typer.echo(
            f"warning: {tokens} tokens are more than the {known} positions of the model: it reads worse", err=True
        )


def quiet(verbose: bool) -> None:
    """Log warnings only, or everything of this package; loading prints no bars of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("sparsemm").setLevel(logging.DEBUG if verbose else logging.WARNING)


def load(model: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """`sparsemm.load_model` of a resolved name, without transformers' loading bars."""
    path = resolve_model(model)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return sparsemm.load_model(path, **options)

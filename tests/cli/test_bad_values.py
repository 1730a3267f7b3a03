"""Every option of every command against values that are wrong for its type: one message, status 2, nothing left behind.

Commands and options are found by walking the program, so that a new one is covered by being born.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sparsemm.cli import app
from sparsemm.cli.common import checkout
from sparsemm.experiments.evaluate import evaluate
from sparsemm.experiments.session import PageReader, heldout_pages
from sparsemm.head_scores import HeadScores
from sparsemm.models import load_model

# What a command is given besides the bad value, where it takes it: enough to run, on a toy model.
GOOD = {
    "model": "{toy}", "image": "{page}", "head_scores": "{scores}", "file": "{scores}", "files": "{scores}",
    "first": "{scores}", "second": "{scores}", "results": "{results}", "source": "{pages}", "output": "new/output",
    "family": "qwen2-vl", "documents": "1", "max_new_tokens": "1", "num_images": "1", "budget": "40",
    "budgets": "40", "pages": "1", "dataset": "{pages}",
}  # fmt: skip
GOOD_IN = {(("tables",), "results"): "{cells}"}
WRITTEN = {"output", "plot", "collect", "folder"}  # where something is written
NOTICES = ("head scores: ", "warning: ", "left out for want of ")  # said before whatever else goes wrong
FREE = {"prompt", "title", "split"}  # any text will do (a split is asked of data sets of the hub only)
FREE_IN = {(("head-scores", "convert"), "model")}  # a name to note

MISSING, FOLDER, BINARY, BROKEN_IMAGE, FOREIGN = "no/such/file", "{folder}", "{binary}", "{broken}", "{foreign}"
BLOCKED = ("{binary}/below", "/proc/nowhere/file")  # nothing can be written below a file, nor there

# Bad values of text options, by name: what they mean is known to the command alone.
TEXT = {
    "model": [MISSING, FOLDER, BINARY, "nobody/nothing", "{damaged}"],
    "device": ["foo", "cuda:99", "meta"],
    "dtype": ["float99", "int8"],
    "method": ["snapkw", ""],
    "methods": ["snapkw", "fullkv,snapkw", ","],
    "budgets": ["8x", "-3", "1.5"],
    "budget": ["0", "eight"],
    "tasks": ["sums", ","],
    "num_words": ["many", "0", ","],
    "heads": ["x", "99-0", "0-0-0", ","],
    "shares": ["200", "x", ","],
    "seeds": ["x"],
    "tokens": ["x", "999", ","],
    "layers": ["x", "999"],
    "part": ["ceiling"],
    "parts": ["ceiling"],
    "page_size": ["large", "0", "1x2x3"],
    "fonts": ["handwriting"],
    "dataset": [MISSING, BINARY, "{folder}"],
    "source": [MISSING, BINARY],
    "task": ["sums"],
    "metric": ["bleu"],
    "only": ["9", "x"],
    "prompts": ["x", "0", ","],
    "batches": ["x", "0", ","],
    "throughput_prompts": ["x"],
    "shapes": ["cube", ","],
    "operations": ["sorting", ","],
    "attn_implementation": ["telepathy"],
    "decode_backend": ["telepathy"],
}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option or argument of a command: its name, type, and what Typer knows of it."""

    name: str
    type: Any
    info: Any

    @property
    def flag(self) -> str | None:
        """As it is typed; None for an argument."""
        if isinstance(self.info, typer.models.ArgumentInfo):
            return None
        named = [each for each in (self.info.default, *(self.info.param_decls or ())) if isinstance(each, str)]
        return named[0] if named else f"--{self.name.replace('_', '-')}"


def commands(program: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Option]]]:
    """Every command by its words, and what it takes."""
    for info in program.registered_commands:
        options = []
        for name, parameter in inspect.signature(info.callback, eval_str=True).parameters.items():
            kind, *known = typing.get_args(parameter.annotation)
            inner = [each for each in typing.get_args(kind) if each is not types.NoneType]
            if typing.get_origin(kind) in (typing.Union, types.UnionType, list):
                kind = inner[0]
            (found,) = [each for each in known if isinstance(each, typer.models.ParameterInfo)]
            options.append(Option(name, kind, found))
        yield (*path, info.name or info.callback.__name__.replace("_", "-")), options
    for group in program.registered_groups:
        yield from commands(group.typer_instance, (*path, group.name))


COMMANDS = dict(commands(app))


def bad_values(path: tuple[str, ...], option: Option) -> list[str]:
    """Values that are wrong for an option or argument, by its type, and by its name where that alone says."""
    if option.type is bool:
        return []
    if option.name in TEXT:
        return [] if (path, option.name) in FREE_IN else TEXT[option.name]
    if option.type in (int, float):
        low, high = option.info.min, option.info.max
        values = ["many"] + ([str(low - 1)] if low is not None else []) + ([str(high + 1)] if high is not None else [])
        return values + (["7", "-1", "nan"] if option.name in ("ratio", "mask_ratio") else [])
    if typing.get_origin(option.type) is typing.Literal:
        return ["nonsense"]
    if option.name in WRITTEN:
        return list(BLOCKED)
    if option.type is Path:
        return [MISSING, FOLDER, BINARY] + ([FOREIGN] if option.name == "head_scores" else [])
    return [] if option.name in FREE else ["no such thing"]


def good_values(path: tuple[str, ...]) -> dict[str, str]:
    """What a command is given besides a bad value."""
    names = [option.name for option in COMMANDS[path]]
    return {name: GOOD_IN.get((path, name), GOOD[name]) for name in names if name in GOOD}


def cases() -> Iterator[Any]:
    for path, options in COMMANDS.items():
        for option in options:
            for value in bad_values(path, option):
                yield pytest.param(path, option.name, value, id=f"{' '.join(path)} {option.name}={value}")


@pytest.fixture(scope="module")
def places(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good files, and bad ones, outside of the folder that a command runs in."""
    from sparsemm.datasets import convert, open_pages

    folder = tmp_path_factory.mktemp("bad")
    binary, broken = folder / "binary", folder / "broken.png"
    binary.write_bytes(bytes(range(256)))
    broken.write_bytes(files["image"].read_bytes()[:60])
    (folder / "empty").mkdir()
    convert(open_pages("documents", limit=1, size=96), folder / "pages", "plain", progress=False)
    damaged = shutil.copytree(files["model"], folder / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    foreign = HeadScores.load(files["scores"])
    foreign.provenance["model"] = "org/another"
    foreign.save(folder / "foreign.json")
    reader = PageReader(
        *load_model(files["model"]), heldout_pages(1, tasks=("read",)), output=folder / "results.json",
        model_name="toy", max_new_tokens=2, progress=False,
    )  # fmt: skip
    evaluate(reader, methods=["fullkv", "snapkv"], budgets=[40])
    return {
        "toy": files["model"], "page": files["image"], "scores": files["scores"], "results": folder / "results.json",
        "cells": checkout() / "assets" / "benchmarks" / "miniatures.json",
        "pages": folder / "pages", "folder": folder / "empty", "binary": binary, "broken": broken,
        "foreign": folder / "foreign.json", "damaged": damaged,
    }  # fmt: skip


@pytest.mark.parametrize(("path", "name", "value"), list(cases()))
def test_a_bad_value_is_one_message(
    path: tuple[str, ...],
    name: str,
    value: str,
    run: Any,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    taken = {option.name: option for option in COMMANDS[path]}
    values = {**good_values(path), name: value}
    if path == ("miniatures", "train"):
        values.setdefault("steps", "1")  # a fault that is missed must not train for an hour
    options = [f"{taken[each].flag}={given.format(**places)}" for each, given in values.items() if taken[each].flag]
    options += ["--no-progress"] if "no_progress" in taken else []
    arguments = [given.format(**places) for each, given in values.items() if taken[each].flag is None]
    before = {place: sorted(place.rglob("*")) for place in (tmp_path, *places.values()) if place.is_dir()}
    outcome = run(*path, *options, "--", *arguments)
    shown = f"sparsemm {' '.join(path)} {' '.join([*options, *arguments])}\n{outcome.out}{outcome.err}"
    assert outcome.status == 2, shown
    assert "Traceback" not in outcome.err, shown
    said = [line for line in outcome.err.splitlines() if not line.startswith(NOTICES)]
    usage = bool(said) and said[0].startswith("Usage: ")
    assert said and (usage or (len(said) == 1 and said[0].startswith("error: "))), shown
    assert {place: sorted(place.rglob("*")) for place in before} == before, shown


@pytest.mark.parametrize(
    "path",
    [
        path
        for path, options in COMMANDS.items()
        if any(each.name == "head_scores" for each in options) and path != ("viz", "calibration")  # draws no scores
    ],
    ids=str,
)
def test_a_command_that_uses_scores_says_which(
    path: tuple[str, ...], run: Any, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on standard error, before the model is loaded."""

    def stop(*given: Any, **options: Any) -> None:
        raise FloatingPointError("stop")

    monkeypatch.setattr("sparsemm.load_model", stop)
    monkeypatch.setattr("sparsemm.bench.kernels.run", stop)
    taken = {option.name: option for option in COMMANDS[path]}
    values = {name: value.format(**places) for name, value in good_values(path).items()}
    given = [f"{taken[name].flag}={value}" for name, value in values.items() if taken[name].flag]
    arguments = [value for name, value in values.items() if taken[name].flag is None]
    given = [each.replace("new/output", "new/output.png") if path[0] == "viz" else each for each in given]
    outcome = run(*path, *given, "--", *arguments)
    lines = [line for line in outcome.err.splitlines() if not line.startswith("left out for want of")]
    assert lines[0] == f"head scores: {places['scores']} (toy)", outcome.err
    assert len(lines) == 2 and lines[1].startswith("error: FloatingPointError: stop"), outcome.err


@pytest.mark.parametrize("path", [("report",), ("tables",), ("head-scores", "show")], ids=str)
def test_good_values_are_good(path: tuple[str, ...], run: Any, places: dict[str, Path]) -> None:
    """Else a bad one beside them would be refused for what they are."""
    outcome = run(*path, *[value.format(**places) for name, value in good_values(path).items() if name != "output"])
    assert outcome.status == 0 and outcome.err == "", outcome.err

"""How the programs are put together: bundles of options, listings of whole sentences, errors as one line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from sparsemm.cli.outputs import settle
from sparsemm.cli.processes import leave_message, run_together
from sparsemm.errors import ConfigError, SparseMMError

logger = logging.getLogger(__name__)


class Program(typer.Typer):
    """A Typer application whose commands may take bundles of options (`expand_bundles`)."""

    def __init__(self, *, help: str, **settings: Any) -> None:
        super().__init__(
            help=help,
            short_help=help,  # click cuts a listing's sentences, but not those that are given as short
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,  # its markup would swallow "[default: ...]"
            add_completion=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(
        self, name: str | None = None, *, alone: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As Typer's; listings of commands show the first sentence of the docstring, all of it.

        `alone` is why the command is not offered in several processes (`--tensor-parallel`).
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            sentence = re.split(r"(?<=\.)\s", " ".join(inspect.getdoc(function).split()))[0]
            expanded = expand_bundles(function, alone=alone)
            super(Program, self).command(name, short_help=sentence, **settings)(expanded)
            return function

        return register


def expand_bundles(function: Callable[..., Any], *, alone: str | None = None) -> Callable[..., Any]:
    """`function` with every parameter whose type is a dataclass replaced by the fields of that dataclass, as options.

    What several commands take is so declared once, and a command is handed the object made of it. One with `processes`
    has the command run by so many together, unless there is a reason to run `alone`.
    """
    signature = inspect.signature(function, eval_str=True)
    bundles = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    parameters = []
    for name, parameter in signature.parameters.items():
        if name in bundles:
            hints = get_type_hints(bundles[name], include_extras=True)
            for field in dataclasses.fields(bundles[name]):
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(
                    inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
                )
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def expanded(**given: Any) -> Any:
        for name, bundle in bundles.items():
            given[name] = bundle(**{field.name: given.pop(field.name) for field in dataclasses.fields(bundle)})
        processes = max((getattr(given[name], "processes", 1) for name in bundles), default=1)
        try:
            if processes > 1:
                if alone is not None:
                    raise ConfigError(f"tensor_parallel={processes}: {alone}")
                if not run_together(processes):
                    return None
            return function(**given)
        except SparseMMError as error:
            error.args = (_name_options(str(error), [parameter.name for parameter in parameters]),)
            raise
        except KeyboardInterrupt:
            again = "; the same command goes on where it stopped" if "fresh" in expanded.__annotations__ else ""
            typer.echo(f"\ninterrupted{again}", err=True)
            raise typer.Exit(130) from None
        finally:
            settle()

    expanded.__signature__ = signature.replace(parameters=parameters)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def run_program(program: Program, name: str) -> None:
    """Run it with the arguments of this process.

    What the user did ends it with one line and status 2, a fault of the program with one line and status 1; where it
    was raised is shown under `--verbose`.
    """
    try:
        program(prog_name=name)
    except Exception as error:
        line = " ".join(str(error).split())
        status = 2
        if isinstance(error, OSError) and error.strerror:
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        elif not isinstance(error, (SparseMMError, OSError)):
            line, status = f"{type(error).__name__}: {line or 'no message'} (--verbose shows where)", 1
        if not leave_message(error, line):
            typer.echo(f"error: {line}", err=True)
        logger.debug("raised here:", exc_info=True)
        sys.exit(status)


def _name_options(message: str, names: list[str]) -> str:
    """The message of an error with the options of a command in the place of the library's names for them."""
    for name in names:
        message = re.sub(rf"\b{name}=", f"--{name.replace('_', '-')} ", message)
    return message

"""Options that several commands share."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from compress.calibrate.errors import InputError, did_you_mean

from compress.options import LARGEST_SEED

F = TypeVar("F", bound=Callable[..., Any])


class Device(click.ParamType):
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; whether the machine has it is found out later."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the spelling.

        Raises:
            InputError: not the name of a device.
        """
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise InputError(
                "--device",
                value,
                "there is no such device",
                allowed="auto, cpu, cuda, cuda:N",
                fix=did_you_mean(value, ["auto", "cpu", "cuda"]),
            )
        return value


class CountOrAll(click.ParamType):
    """A positive number, or ``all``, which becomes None."""

    name = "n|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Parse ``all`` or a number from 1."""
        if value == "all":
            return None
        return click.IntRange(min=1).convert(value, param, ctx)


class Names(click.ParamType):
    """Names separated by commas, as a tuple; ``none`` is the empty tuple."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split at commas."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if not names:
            self.fail("no name given", param, ctx)
        return () if names == ("none",) else names


class Counts(click.ParamType):
    """Positive numbers separated by commas, as a tuple."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Split at commas."""
        if isinstance(value, tuple):
            return value
        number = click.IntRange(min=1)
        return tuple(number.convert(item.strip(), param, ctx) for item in value.split(","))


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """See that a page can be written, before anything else is done.

    Raises:
        InputError: its folder doesn't exist.
    """
    if value is not None and not value.absolute().parent.is_dir():
        raise InputError("--html", value, f"there is no folder {value.absolute().parent}")
    return value


def _go_offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        # Hugging Face's libraries read the variable once, when they are imported, which no command has done yet.
        os.environ["HF_HUB_OFFLINE"] = "1"


task_path_option = click.option(
    "--task-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with lm-eval task files; data files are relative to the task file.",
)
page_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_in_a_folder,
    help="Also write a page with charts.",
)
activations_option = click.option(
    "--activations",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="What packed layers multiply on a CPU; int8 is faster and less exact.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of packed layers on a CPU for up to 8 tokens; longer prompts take as many as PyTorch has.",
)
kv_option = click.option(
    "--kv/--no-kv",
    default=True,
    show_default=True,
    help="Pack the KV cache as an artifact's plan says.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

_RECIPE_OPTIONS = (
    click.option("--model", "-m", required=True, help="Hub id, local folder, or .gguf file."),
    click.option("--recipe", "-r", required=True, help="Name of a shipped recipe, or a .yaml file."),
    click.option(
        "--set", "set_", metavar="SECTION.KEY=VALUE", multiple=True, help="Override a recipe key; may repeat."
    ),
    click.option("--calibration", metavar="SRC", help="Calibration text (calibration.source)."),
    click.option("--eval", "eval_tasks", type=Names(), help="Tasks to score (eval.tasks); `none` skips scoring."),
    task_path_option,
    click.option(
        "--seed",
        type=click.IntRange(0, LARGEST_SEED),
        metavar="N",
        help="Of every random choice (calibration.seed and eval.seed).",
    ),
)
_MACHINE_OPTIONS = (
    click.option("--device", type=Device(), default="auto", show_default=True, help="Or cpu, cuda, cuda:N."),
    click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_go_offline,
        help="Don't touch the network (sets HF_HUB_OFFLINE).",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python code run."),
)


def recipe_options(command: F) -> F:
    """``--model``, ``--recipe`` and all options that override the recipe's keys."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def machine_options(command: F) -> F:
    """Where to run and what to trust."""
    for option in reversed(_MACHINE_OPTIONS):
        command = option(command)
    return command


def show(lines: list[str], data: dict[str, Any], as_json: bool) -> None:
    """Print a result on stdout: JSON for scripts, or lines for people."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))

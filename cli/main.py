"""The command group: subcommands are imported when asked for, user errors become one line and exit code 2."""

import importlib
from typing import Any

import click
from compress.calibrate.errors import InputError, did_you_mean

from compress import __version__

COMMANDS = (
    "run",
    "plan",
    "eval",
    "bench",
    "prove",
    "report",
    "compare",
    "inspect",
    "heads",
    "push",
    "recipes",
    "generate",
    "serve",
    "doctor",
)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_RESUMED = {
    "run": ": the same command goes on from the last finished layer",
    "push": ": the same command sends what isn't there yet",
}


class UserError(click.ClickException):
    """Bad input, shown without a traceback."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """One line on stderr."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


class LazyGroup(click.Group):
    """A group whose command ``x`` is the function ``x_command`` of the module ``compress.cli.x``.

    The modules themselves import click and little else: torch and transformers are imported by the functions they
    call, so that ``--help`` answers at once.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return the command, or None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"compress.cli.{cmd_name}"), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = did_you_mean(args[0], COMMANDS)
            raise InputError(args[0], None, "there is no such command", allowed=", ".join(COMMANDS), fix=near)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; this is the only place where errors are turned into exit codes."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            hint = _RESUMED.get(ctx.invoked_subcommand or "", "")
            click.echo(f"interrupted{hint}", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="compress")
def main() -> None:
    """Compress a pretrained language model with one command, and prove what it cost.

    \b
    compress run --model HuggingFaceTB/SmolLM2-135M-Instruct --recipe rsq
    """

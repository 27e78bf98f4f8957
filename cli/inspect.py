"""``compress inspect``: what is in an artifact."""

from pathlib import Path

import click
from compress.cli.params import json_option, show


@click.command("inspect", short_help="Show what is in an artifact.")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def inspect_command(folder: Path, as_json: bool) -> None:
    """Show what is in an artifact: format, bits, sizes, how it was made, and whether it is complete."""
    from compress.artifact.inspect import inspect

    inspection = inspect(folder)
    show(inspection.lines(), inspection.to_json(), as_json)

"""``compress plan``: what would happen."""

from typing import Any

import click
from compress.cli.params import json_option, machine_options, recipe_options, show

from compress.options import RunOptions


@click.command("plan", short_help="Show what a run would do.")
@recipe_options
@machine_options
@json_option
def plan_command(model: str, recipe: str, as_json: bool, set_: tuple[str, ...], **options: Any) -> None:
    """Show what a run would do: layers, sizes, memory, time, and what was chosen and why.

    Reads the model's configuration, not its weights.
    """
    run_options = RunOptions(set=set_, dry_run=True, **options)
    from compress.recipe import Recipe

    resolved = Recipe.load(recipe, run_options.overrides())

    from compress.pipeline import plan

    planned = plan(model, resolved, run_options)
    show(planned.lines(), planned.to_json(), as_json)

"""``compress run``: the whole job."""

from pathlib import Path
from typing import Any

import click
from compress.cli.params import json_option, machine_options, recipe_options, show

from compress.options import RunOptions


@click.command("run", short_help="Compress a model, check it, score it.")
@recipe_options
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder of the artifact.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option(
    "--resume/--fresh", default=True, show_default=True, help="Continue an interrupted run, or throw its work away."
)
@click.option("--push", metavar="ORG/NAME", help="Put the finished artifact on the Hugging Face Hub; not asked again.")
@click.option("--public", is_flag=True, help="With --push: let everyone see it; without this it is private.")
@machine_options
@json_option
def run_command(
    model: str, recipe: str, out: Path | None, as_json: bool, set_: tuple[str, ...], **options: Any
) -> None:
    """Compress a model, write the artifact, check it, and score it before and after.

    \b
    compress run --model HuggingFaceTB/SmolLM2-135M-Instruct --recipe rsq
    compress run --model ./my-model --recipe rsq --set weights.bits=4 --calibration my-text.jsonl --eval piqa
    """
    run_options = RunOptions(set=set_, **options)
    from compress.recipe import Recipe

    # Before torch is imported, so that a misspelt key is answered at once.
    resolved = Recipe.load(recipe, run_options.overrides())

    from compress.pipeline import plan, run

    if run_options.dry_run:
        planned = plan(model, resolved, run_options, out)
        show(planned.lines(), planned.to_json(), as_json)
        return

    from compress.cli.console import Console

    with Console() as console:
        result = run(model, resolved, out=out, options=run_options, on_event=console.on_event)
    show(result.summary, {"ok": result.ok, "out": str(result.out), "url": result.url, "report": result.report}, as_json)
    if not result.ok:
        click.get_current_context().exit(1)

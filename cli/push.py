"""``compress push``: put an artifact on the Hugging Face Hub."""

import sys
from pathlib import Path

import click
from compress.calibrate.errors import InputError
from compress.cli.params import json_option, show


@click.command("push", short_help="Put an artifact on the Hugging Face Hub.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="Let everyone see it; without this it is private.")
@click.option("--overwrite", is_flag=True, help="Replace another model that is there; its history keeps the old files.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent and stop.")
@click.option("--yes", "-y", is_flag=True, help="Don't ask; needed where there is no terminal.")
@json_option
def push_command(
    folder: Path, repo: str, public: bool, overwrite: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Put an artifact on the Hugging Face Hub, into the repository ORG/NAME, which is made if it doesn't exist.

    \b
    compress push out/demo your-name/demo-W3
    compress push out/demo your-name/demo-W3 --public --yes

    Shows what will be sent and asks. Only the artifact's own files go, without local paths in report, recipe and card.
    What is on the Hub already isn't sent again: after an interruption the same command goes on. Log in first with
    `hf auth login`, or set HF_TOKEN.
    """
    from compress.artifact.outgoing import check_finished

    check_finished(folder)
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InputError(
            "--yes", None, "is needed where nobody can be asked", fix="see what would be sent with --dry-run"
        )
    from compress.artifact.account import Destination
    from compress.artifact.hub import plan_push, send

    plan = plan_push(folder, Destination(repo, public, overwrite))
    if dry_run:
        show(plan.lines(), plan.to_json(), as_json)
        return
    click.echo("\n".join(plan.lines()), err=True)
    if not yes and plan.needed and not click.confirm("Send it?", err=True):
        click.echo("nothing was sent", err=True)
        click.get_current_context().exit(1)
    pushed = send(plan)
    show(pushed.lines(), pushed.to_json(), as_json)

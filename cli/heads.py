"""``compress heads``: which KV heads need far tokens."""

from pathlib import Path

import click
from compress.cli.params import json_option, page_option, show


@click.command("heads", short_help="Show which KV heads need far tokens.")
@click.argument("profile", metavar="PROFILE|ARTIFACT", type=click.Path(path_type=Path))
@click.option("--score", metavar="NAME", help="Which score is drawn; by default the profile's first.")
@page_option
@json_option
def heads_command(profile: Path, score: str | None, html: Path | None, as_json: bool) -> None:
    """Show a profile of heads: a file head_profile.json, or an artifact that was made with one."""
    from compress.heads.profile import read_profile

    found = read_profile(profile)
    lines = found.lines(score)
    if html is not None:
        from compress.heads.profile_page import profile_page
        from compress.work import write_text

        folder = profile.resolve() if profile.is_dir() else profile.resolve().parent
        write_text(html, profile_page(found, folder.name))
    show(lines, found.to_json(), as_json)

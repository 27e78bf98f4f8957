"""``compress compare``: artifacts side by side."""

from pathlib import Path

import click
from compress.cli.params import json_option, page_option, show


@click.command("compare", short_help="Lay several artifacts side by side.")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@page_option
@json_option
def compare_command(artifacts: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Lay artifacts side by side, from the reports in their folders; the original is the first column.

    Figures that weren't measured in the same way are marked, not compared.

    \b
    compress compare out/SmolLM2-W4-g64 out/SmolLM2-W3-g64 --html side-by-side.html
    """
    from compress.comparison import compare_artifacts, write_comparison

    comparison = compare_artifacts(artifacts)
    show(comparison.lines(), comparison.to_json(), as_json)
    if html is not None:
        write_comparison(html, comparison)
        click.echo(f"page: {html}", err=True)

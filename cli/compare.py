"""``compress compare``: artifacts side by side."""

from pathlib import Path

import click
from compress.calibrate.errors import InputError
from compress.cli.params import json_option, show


@click.command("compare", short_help="Lay several artifacts side by side.")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with charts.")
@json_option
def compare_command(artifacts: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Lay artifacts side by side, from the reports in their folders; the original is the first column.

    Figures that weren't measured in the same way are marked, not compared.

    \b
    compress compare out/SmolLM2-W4-g64 out/SmolLM2-W3-g64 --html side-by-side.html
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError("--html", html, f"there is no folder {html.absolute().parent}")
    from compress.comparison import compare_artifacts

    comparison = compare_artifacts(artifacts)
    show(comparison.lines(), comparison.to_json(), as_json)
    if html is not None:
        from compress.evalsuite.report import render_comparison

        from compress.work import write_text

        write_text(html, render_comparison(list(zip(comparison.names, comparison.reports, strict=True))))
        click.echo(f"page: {html}", err=True)

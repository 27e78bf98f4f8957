"""``compress report``: the HTML page of an artifact."""

from pathlib import Path

import click


@click.command("report", short_help="Rebuild an artifact's HTML report.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def report_command(folder: Path) -> None:
    """Write DIR/report.html again from DIR/report.json: one file that opens anywhere, without a network."""
    from compress.report_page import rebuild_page

    click.echo(rebuild_page(folder))

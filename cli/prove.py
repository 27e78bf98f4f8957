"""``compress prove``: artifacts measured beside their original, on one page."""

from pathlib import Path
from typing import Any

import click
from compress.cli.eval import eval_options
from compress.cli.params import Names, json_option, machine_options, page_option, show

from compress.options import BenchOptions, EvalOptions

ROUNDS = 3
"""Of each artifact's benchmark: ``compress bench`` has five, which takes longer where artifacts are many."""


@click.command("prove", short_help="Measure artifacts beside their original, on one page.")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tasks",
    "-t",
    type=Names(),
    default=("perplexity", "divergence"),
    help="perplexity, divergence, passkey and its like, or of lm-eval; or none.  [default: perplexity,divergence]",
)
@click.option("--baseline", metavar="MODEL", help="The original.  [default: where the reports say]")
@click.option("--bench/--no-bench", default=True, show_default=True, help="Measure size, memory and speed too.")
@page_option
@eval_options
@machine_options
@json_option
def prove_command(
    artifacts: tuple[Path, ...], tasks: tuple[str, ...], bench: bool, html: Path | None, as_json: bool, **options: Any
) -> None:
    """Show what ARTIFACTs of one original lost and gained: the original is scored once, everything on the same items.

    The figures go into each artifact's report as well, in the place of older ones.

    \b
    compress prove out/SmolLM2-W4-g64 out/SmolLM2-W3-g64 --tasks perplexity,divergence,piqa,passkey --html proof.html
    """
    scoring = EvalOptions(**options)
    bench_options = None
    if bench:
        bench_options = BenchOptions(rounds=ROUNDS, device=scoring.device, trust_remote_code=scoring.trust_remote_code)
    from compress.cli.console import Console

    from compress.comparison import write_comparison
    from compress.prove import prove

    with Console() as console:
        comparison = prove(artifacts, tasks, scoring, bench_options, console.on_event)
    show(comparison.lines(), comparison.to_json(), as_json)
    if html is not None:
        write_comparison(html, comparison)
        click.echo(f"page: {html}", err=True)

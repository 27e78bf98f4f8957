"""``compress bench``: what a model costs to hold and to run."""

from typing import Any

import click
from compress.cli.params import Counts, activations_option, json_option, machine_options, show, threads_option

from compress.options import BenchOptions


@click.command("bench", short_help="Measure size, memory and speed beside the original.")
@click.argument("artifact")
@click.option(
    "--against",
    metavar="MODEL",
    default="dense",
    show_default=True,
    help="The baseline; `dense` is the original that the artifact's report names.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Of the timed prompt.  [default: 512]")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=BenchOptions.new_tokens,
    show_default=True,
    help="Generated after it.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=BenchOptions.rounds,
    show_default=True,
    help="Each times model, baseline, baseline, model.",
)
@click.option("--lengths", type=Counts(), help="Tokens in the KV cache whose bytes are counted.  [default: 512,2048]")
@click.option(
    "--dtype",
    metavar="TYPE",
    default=BenchOptions.dtype,
    show_default=True,
    help="Of the computation: float32, bfloat16 or float16; auto is float32 on a CPU, else bfloat16.",
)
@click.option(
    "--one-at-a-time",
    is_flag=True,
    help="Keep one model in memory, loading it for each turn; done anyway where memory is short.",
)
@click.option("--seed", type=click.IntRange(min=0), default=BenchOptions.seed, show_default=True, help="Of the prompt.")
@click.option(
    "--no-save", is_flag=True, help="Leave the artifact's report as it is, as with any baseline but its original."
)
@click.option(
    "--kv",
    is_flag=False,
    flag_value="own",
    metavar="[RECIPE|PLAN]",
    help="Count the KV cache only, beside other ways to keep it: the artifact's own, or a recipe's or plan's for any"
    " model. Runs nothing; takes --lengths.",
)
@activations_option
@threads_option
@machine_options
@json_option
def bench_command(artifact: str, against: str, no_save: bool, kv: str | None, as_json: bool, **options: Any) -> None:
    """Measure ARTIFACT beside its original in one run, and add the figures to its report.

    Weight bytes on disk and in memory, peak memory, time to first token, tokens a second, bytes of the KV cache; each
    as a ratio with its spread over rounds. Another model than an artifact needs --against.

    \b
    compress bench out/SmolLM2-W4-g64 --against dense
    compress bench out/SmolLM2-KV --kv
    """
    if kv is not None:
        _bench_kv(artifact, kv, options["lengths"], no_save, as_json)
        return
    bench_options = BenchOptions(**options)
    from compress.cli.console import Console
    from compress.evalsuite.efficiency import table

    from compress.bench import bench, save

    with Console() as console:
        section = bench(artifact, against, bench_options, console.on_event)
    if not no_save:
        report = save(artifact, against, section)
        click.echo(
            "not saved: no comparison of an artifact with its original" if report is None else f"saved in {report}",
            err=True,
        )
    show(table(section), section, as_json)


def _bench_kv(artifact: str, kv: str, lengths: tuple[int, ...] | None, no_save: bool, as_json: bool) -> None:
    """Storage only; what isn't the artifact's own cache has no place in its report."""
    from compress.bench_kv import OWN, bench_kv, kv_table, save_kv

    section = bench_kv(artifact, kv, lengths)
    if kv == OWN and not no_save:
        report = save_kv(artifact, section)
        click.echo("not saved: no artifact" if report is None else f"saved in {report}", err=True)
    show(kv_table(section), section, as_json)

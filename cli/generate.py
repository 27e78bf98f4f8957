"""``compress generate``: try a model."""

from typing import Any

import click
from compress.cli.params import activations_option, kv_option, machine_options, threads_option

from compress.options import GenerateOptions


@click.command("generate", short_help="Try a model on a prompt.")
@click.argument("model", metavar="DIR")
@click.option("--prompt", "-p", required=True, help="What the model continues or answers.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=GenerateOptions.max_new_tokens,
    show_default=True,
    help="Where to stop at the latest.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=GenerateOptions.temperature,
    show_default=True,
    help="0 takes the likeliest token every time.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=GenerateOptions.seed, show_default=True, help="Seed of the sampling."
)
@click.option("--chat/--no-chat", default=None, help="Use the chat template [default: if the model has one].")
@activations_option
@threads_option
@kv_option
@machine_options
def generate_command(model: str, prompt: str, **options: Any) -> None:
    """Generate text with the model or artifact in DIR (a Hub id works too), as it is made."""
    from compress.runtime import generate

    for piece in generate(model, prompt, GenerateOptions(**options)):
        click.echo(piece, nl=False)
    click.echo()

"""``compress serve``: a model behind OpenAI's API."""

from pathlib import Path
from typing import Any

import click
from compress.cli.params import activations_option, kv_option, machine_options, threads_option

from compress.options import ServeOptions


@click.command("serve", short_help="Serve a model to OpenAI clients.")
@click.argument("model", metavar="DIR")
@click.option(
    "--host", default=ServeOptions.host, show_default=True, help="Address to listen at; 0.0.0.0 is the whole network."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=ServeOptions.port, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the key that clients must send [default: none].",
)
@click.option("--served-name", metavar="NAME", help="What requests call the model [default: the folder's name].")
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    default=ServeOptions.max_concurrent,
    show_default=True,
    help="Requests answered at the same time; each has a cache of its own.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=ServeOptions.max_queue,
    show_default=True,
    help="Requests that may wait for that; further ones get status 503.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(min=1),
    default=ServeOptions.max_request_bytes,
    show_default=True,
    help="Larger requests get status 413.",
)
@click.option(
    "--grace-seconds",
    type=click.IntRange(min=0),
    default=ServeOptions.grace_seconds,
    show_default=True,
    help="Time that running requests have left after Ctrl-C or SIGTERM.",
)
@activations_option
@threads_option
@kv_option
@machine_options
def serve_command(model: str, **options: Any) -> None:
    """Serve the model or artifact in DIR (a Hub id works too) as an OpenAI-compatible API."""
    from compress.serving.server import serve

    serve(
        model,
        ServeOptions(**options),
        on_ready=lambda url: click.echo(f"serving {model} at {url} (Ctrl-C stops)"),
        on_warning=lambda text: click.echo(f"warning: {text}", err=True),
    )

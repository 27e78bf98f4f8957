"""``compress eval``: score a model."""

from typing import Any

import click
from compress.calibrate.errors import InputError
from compress.cli.params import CountOrAll, Names, json_option, machine_options, show, task_path_option

from compress.options import EvalOptions


@click.command("eval", short_help="Score a model, also beside another.")
@click.argument("model")
@click.option(
    "--tasks", "-t", type=Names(), default=("perplexity",), help="Of lm-eval, or perplexity.  [default: perplexity]"
)
@click.option("--baseline", metavar="MODEL", help="A second model, laid beside the first with the standard error.")
@task_path_option
@click.option("--limit", type=click.IntRange(min=1), help="Items a task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in a prompt.  [default: the task's own]")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=EvalOptions.window,
    show_default=True,
    help="Tokens a perplexity window.",
)
@click.option(
    "--windows", type=CountOrAll(), default=EvalOptions.windows, show_default=True, help="Number of perplexity windows."
)
@click.option("--text", metavar="SRC", default=EvalOptions.text, show_default=True, help="Text of the perplexity.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=EvalOptions.batch_size,
    show_default=True,
    help="Sequences a forward pass.",
)
@machine_options
@json_option
def eval_command(model: str, tasks: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Score MODEL (Hub id, folder, artifact or .gguf file) on lm-eval tasks and perplexity.

    \b
    compress eval out/SmolLM2-W3-g64 --tasks perplexity,piqa --baseline HuggingFaceTB/SmolLM2-135M-Instruct
    """
    if not tasks:
        raise InputError("--tasks", "none", "there is nothing to score", fix="name a task, e.g. perplexity")
    from compress.evaluate import evaluate

    outcome = evaluate(model, list(tasks), EvalOptions(**options))
    show(outcome.lines(), outcome.to_json(), as_json)

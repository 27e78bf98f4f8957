"""``compress eval``: score a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from compress.calibrate.errors import InputError
from compress.cli.params import (
    CountOrAll,
    Counts,
    Names,
    activations_option,
    json_option,
    machine_options,
    show,
    task_path_option,
    threads_option,
)

from compress.options import LARGEST_SEED, EvalOptions

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    task_path_option,
    click.option("--limit", type=click.IntRange(min=1), help="Items an lm-eval task."),
    click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in a prompt.  [default: the task's own]"),
    click.option(
        "--chat-template", "apply_chat_template", is_flag=True, help="Ask lm-eval's questions in the chat template."
    ),
    click.option(
        "--text", metavar="SRC", default=EvalOptions.text, show_default=True, help="For perplexity, divergence."
    ),
    click.option(
        "--window",
        type=click.IntRange(min=2),
        default=EvalOptions.window,
        show_default=True,
        help="Tokens a window of it.",
    ),
    click.option(
        "--windows",
        type=CountOrAll(),
        default=EvalOptions.windows,
        show_default=True,
        help="Number of windows of it.",
    ),
    click.option(
        "--stride", type=click.IntRange(min=1), help="Tokens from one window to the next.  [default: no overlap]"
    ),
    click.option(
        "--lengths",
        type=Counts(),
        default=EvalOptions.lengths,
        help="Tokens of long-context prompts.  [default: 2048,4096]",
    ),
    click.option(
        "--depths",
        type=click.IntRange(min=1),
        default=EvalOptions.depths,
        show_default=True,
        help="Places of the needle in them.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=EvalOptions.samples,
        show_default=True,
        help="Questions a length and depth.",
    ),
    click.option(
        "--haystack",
        metavar="SRC",
        default=EvalOptions.haystack,
        show_default=True,
        help="Text around the needle; repeat is RULER's sentence.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, LARGEST_SEED),
        default=EvalOptions.seed,
        show_default=True,
        help="Of these questions.",
    ),
    click.option(
        "--kv-prompt",
        type=click.IntRange(min=1),
        help="Of a window, what fills a compressed KV cache unscored.  [default: half]",
    ),
    click.option(
        "--kv-chunk",
        type=click.IntRange(min=1),
        default=EvalOptions.kv_chunk,
        show_default=True,
        help="Tokens at once behind it.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=EvalOptions.batch_size,
        show_default=True,
        help="Sequences a forward pass.",
    ),
)


def eval_options(command: F) -> F:
    """How to score: the options of ``compress eval`` that ``compress prove`` has too."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command("eval", short_help="Score a model, also beside another.")
@click.argument("model")
@click.option(
    "--tasks",
    "-t",
    type=Names(),
    default=("perplexity",),
    help="perplexity, divergence, passkey and its like, or of lm-eval.  [default: perplexity]",
)
@click.option("--baseline", metavar="MODEL", help="The original, laid beside the model item by item.")
@eval_options
@click.option(
    "--output",
    "-o",
    metavar="DIR|FILE.json",
    type=click.Path(path_type=Path),
    help="Write lm-eval's own files into DIR/MODEL, or what --json prints into a file.",
)
@click.option("--packed", is_flag=True, help="Score an artifact as it is run, over packed weights, not unpacked.")
@activations_option
@threads_option
@click.option("--log-samples", is_flag=True, help="With --output DIR: every question with its answer, too.")
@machine_options
@json_option
def eval_command(
    model: str, tasks: tuple[str, ...], output: Path | None, log_samples: bool, as_json: bool, **options: Any
) -> None:
    """Score MODEL (Hub id, folder, artifact or .gguf file): perplexity, long context, lm-eval's tasks.

    Beside a --baseline every row has a p-value: how likely so large a difference would be by chance.

    \b
    compress eval out/SmolLM2-W3-g64 --baseline HuggingFaceTB/SmolLM2-135M-Instruct \\
        --tasks perplexity,divergence,passkey,piqa
    """
    if not tasks:
        raise InputError("--tasks", "none", "there is nothing to score", fix="name a task, e.g. perplexity")
    if log_samples and output is None:
        raise InputError("--log-samples", None, "there is no folder for them", fix="name one: --output DIR")
    from compress.eval_output import Output
    from compress.evaluate import evaluate

    place = None if output is None else Output(output, log_samples)
    outcome = evaluate(model, list(tasks), EvalOptions(**options), output=place)
    show(outcome.lines(), outcome.to_json(), as_json)

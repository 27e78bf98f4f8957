"""Layers that share attention, or keys and values, on a real model: what copying costs, what a refit brings back.

Layers are chosen as the recipe's section says (in WORK, which a second call goes on with); then perplexity is measured
on another text for each variant: copying alone with every head in its place (``same``) and with matched heads
(``matched``), both refitted (``+output``: output projections; ``+values``: value projections too). KVSharer has no
heads to match.

    python benchmarks/sharing.py MODEL --text FILE --test FILE --work DIR
        [--set share.ratio=0.2 --set share.budget=null] [--variants same,matched,same+output,matched+output]
"""

import json
import time
from pathlib import Path
from statistics import mean

import click
import torch
from compress.calibrate.text import open_text
from compress.calibrate.windows import token_windows
from compress.evalsuite.perplexity import perplexity

from compress.events import Event, Message
from compress.job import Job
from compress.model import open_model
from compress.recipe import Recipe
from compress.share.sharing import Sharer
from compress.share.workbench import Text, Workbench
from compress.work import WorkFolder

FIT = 32  # windows that variants are fitted on
VARIANTS = "same,matched,same+output,matched+output,matched+values"


def show(event: Event) -> None:
    """Print lines that say something."""
    if isinstance(event, Message):
        click.echo(event.text, err=True)


def measured(sharer: Sharer, chosen: dict[int, int], variant: str, ids: torch.Tensor, window: int) -> dict[str, float]:
    """Perplexity of one variant, and the mean relative error of its layers' outputs before and after its fit."""
    heads, _, refit = variant.partition("+")
    settings = sharer.settings.model_copy(update={"heads": heads, "refit": refit or "none"})
    similarity = sharer.similarity() if heads == "matched" and settings.method == "echoatt" else None
    text = Text(sharer.text.held, sharer.text.fit[:FIT])
    bench = Workbench(sharer.trial, text, settings, similarity, sharer.scratch / "variants")
    with sharer.trial.at_work():
        bench.open(chosen, chosen.values())
        shares = {layer: bench.share_of(layer, source) for layer, source in chosen.items()}
        held = bench.add_all(shares)
        found = perplexity(sharer.model, ids, window=window)
    told = {"perplexity": found.value, "stderr": found.stderr or 0.0, "held_out_loss": held}
    if fits := list(bench.fits.values()):
        told |= {"before": mean(fit.before for fit in fits), "after": mean(fit.after for fit in fits)}
    return told


@click.command()
@click.argument("model")
@click.option("--text", required=True, help="Calibration text.")
@click.option("--test", "test", required=True, help="Text that perplexity is measured on.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the work.")
@click.option("--set", "overrides", multiple=True, help="As in compress run.")
@click.option("--variants", default=VARIANTS, show_default=True)
@click.option("--counts", default="", help="How many of the layers share, in the order of choosing; all by default.")
@click.option("--samples", default=56, show_default=True, help="Windows of calibration text.")
@click.option("--seq-len", default=512, show_default=True, help="Tokens of one.")
@click.option("--window", default=1024, show_default=True, help="Tokens of a window of the test text.")
@click.option("--windows", default=12, show_default=True, help="How many.")
def main(
    model: str,
    text: str,
    test: str,
    work: Path,
    overrides: tuple[str, ...],
    variants: str,
    counts: str,
    samples: int,
    seq_len: int,
    window: int,
    windows: int,
) -> None:
    calibration = {"source": text, "samples": samples, "seq_len": seq_len}
    recipe = Recipe.load({"name": "sharing", "calibration": calibration, "share": {}}, overrides)
    assert recipe.share is not None
    view = open_model(model)
    tokenizer = view.tokenizer()
    ids = token_windows(open_text(text), tokenizer, samples, seq_len, 0)
    tested = tokenizer("\n\n".join(open_text(test).documents)[: window * windows * 8], add_special_tokens=False)
    tokens = torch.tensor(tested["input_ids"][: window * windows])
    section = recipe.share.model_dump(mode="json")
    deciding = {key: value for key, value in section.items() if not key.startswith("distill")}
    mark = {"share": deciding, "model": model, "digest": ids.digest}
    with WorkFolder(work, mark, resume=True) as folder:
        job = Job(view, recipe, ids, folder, torch.device("cpu"), show, {"seed": 0})
        sharer = Sharer(job, recipe.share, view.load_dense().requires_grad_(False))
        similarity = sharer.similarity() if recipe.share.method == "echoatt" else None
        chosen = sharer.chosen(similarity)
        click.echo(f"protected layers {job.folder.stage('share').get('protected')}; chosen {chosen}")
        state = folder.stage("benchmark")
        sizes = [int(count) for count in counts.split(",") if count] or [len(chosen)]
        runs = [(size, variant) for size in sizes for variant in variants.split(",") if chosen]
        for size, variant in [(0, "dense"), *runs]:
            key = f"{size} {variant} {window}x{windows}"
            if key not in state:
                begun = time.perf_counter()
                if variant == "dense":
                    state[key] = {"perplexity": perplexity(sharer.model, tokens, window=window).value}
                else:
                    state[key] = measured(sharer, dict(list(chosen.items())[:size]), variant, tokens, window)
                state[key]["seconds"] = round(time.perf_counter() - begun, 1)
                folder.save()
            own = state[key]
            grown = own["perplexity"] / state[f"0 dense {window}x{windows}"]["perplexity"] - 1
            click.echo(f"{size:2d} {variant:16s} {own['perplexity']:9.3f} {grown:+8.2%}  {json.dumps(own)}")


if __name__ == "__main__":
    main()

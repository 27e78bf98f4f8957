"""Distilling a real model whose layers share attention: perplexity of the refitted model, and after the distillation.

Layers share as the recipe's section says and are refitted; then the model is distilled with the section's settings on
windows of ``--source`` (a text, or ``self``: the model writes it), in WORK, which a second call goes on with; other
settings of the distillation go into other folders of it with ``--name``. Perplexity is of another text.

    python benchmarks/distillation.py MODEL --text FILE --test FILE --work DIR --set "share.pairs=[[12,11],[14,13]]"
        [--set share.distill_lr=3e-4] [--name lr3e-4] [--source FILE|self] [--source-windows 256]
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import click
import torch
from compress.calibrate.text import open_text
from compress.calibrate.windows import token_windows
from compress.evalsuite.perplexity import perplexity
from transformers import PreTrainedModel

from compress.events import Event, Message, StepDone
from compress.job import Job
from compress.model import open_model
from compress.recipe import Recipe
from compress.schema import Sharing
from compress.share.distill_settings import Distillation
from compress.share.distill_text import windows as text_windows
from compress.share.modules import share_layers
from compress.share.sharing import Sharer
from compress.share.stage import distillation
from compress.share.trainer import Task
from compress.share.trainer_launch import ORDER, Order, distil, read_order, write_order
from compress.share.trial import put
from compress.work import WorkFolder


def show(event: Event) -> None:
    """Print lines that say something."""
    match event:
        case Message(text):
            click.echo(text, err=True)
        case StepDone(_, total, seconds, told):
            click.echo(f"  {told}  {seconds:.1f} s of {total}", err=True)


def refitted(job: Job, settings: Sharing, model: PreTrainedModel) -> Order:
    """How layers share, and what was fitted to it; read again if it has been found before."""
    kept = job.folder.path / "refitted"
    if not (kept / ORDER).exists():
        sharer, student = Sharer(job, settings, model), copy.deepcopy(model)
        similarity = sharer.similarity() if settings.heads == "matched" else None
        shares, fits = sharer.fit(sharer.chosen(similarity), similarity)
        share_layers(student, shares)
        for layer, found in fits.items():
            put(student.base_model.layers[layer].self_attn, found.fitted)
        write_order(Task(student, model, shares, torch.zeros(1, 1)), Distillation(), kept, "")
    return read_order(kept)


def built(model: PreTrainedModel, order: Order, fitted: bool) -> PreTrainedModel:
    """A copy of a model whose layers share."""
    student = copy.deepcopy(model)
    share_layers(student, order.shares)
    with torch.no_grad():
        for name, tensor in order.start.items() if fitted else ():
            student.get_parameter(name).copy_(tensor)
    return student


@click.command()
@click.argument("model")
@click.option("--text", required=True, help="Text that projections are fitted on.")
@click.option("--test", "test", required=True, help="Text that perplexity is measured on.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the work.")
@click.option("--set", "overrides", multiple=True, help="As in compress run; share.distill_* may differ between calls.")
@click.option("--name", default="distill", show_default=True, help="Of this distillation.")
@click.option("--source", help="Text that is learnt from; by default that of --text.")
@click.option("--source-windows", default=256, show_default=True, help="Windows of it.")
@click.option("--samples", default=56, show_default=True, help="Windows of --text.")
@click.option("--windows", default=8, show_default=True, help="Windows of --test, of 1,024 tokens.")
def main(
    model: str,
    text: str,
    test: str,
    work: Path,
    overrides: tuple[str, ...],
    name: str,
    source: str | None,
    source_windows: int,
    samples: int,
    windows: int,
) -> None:
    content = {"name": "distillation", "calibration": {"source": text, "samples": samples, "seq_len": 512}, "share": {}}
    recipe = Recipe.load(content, overrides)
    assert recipe.share is not None
    view = open_model(model)
    tokenizer = view.tokenizer()
    ids = token_windows(open_text(text), tokenizer, samples, 512, 0)
    held = tokenizer("\n\n".join(open_text(test).documents)[: 8192 * windows], add_special_tokens=False)["input_ids"]
    tested = torch.tensor(held[: 1024 * windows])
    section = recipe.share.model_dump(mode="json")
    mark = {"share": {key: value for key, value in section.items() if "distill" not in key}, "digest": ids.digest}
    with WorkFolder(work, mark, resume=True) as folder:
        job = Job(view, recipe, ids, folder, torch.device("cpu"), show, {"seed": 0})
        teacher = view.load_dense().requires_grad_(False)
        state = folder.stage("benchmark")

        def measure(key: str, measured: PreTrainedModel) -> None:
            if key not in state:
                state[key] = perplexity(measured, tested, window=1024).value
                folder.save()

        order = refitted(job, recipe.share, teacher)
        student = built(teacher, order, fitted=True)
        settings = replace(distillation(recipe.share), source=source or text, windows=source_windows, keep_minutes=0.5)
        learnt, origin = text_windows(settings, view, ids.ids, 1, lambda done, wanted: None)
        click.echo(f"learning from {origin}", err=True)
        trained = distil(Task(student, teacher, order.shares, learnt), settings, folder.path / name, show, model)
        measure(name, student)
        measure("dense", teacher)
        measure("refitted", built(teacher, order, fitted=True))
        measure("copied", built(teacher, order, fitted=False))
        best = json.dumps(trained.report["best"])
    click.echo("  ".join(f"{key} {state[key]:.3f}" for key in ("dense", "copied", "refitted", name)))
    click.echo(f"{name}: {trained.report['steps']} steps, {trained.report['tokens']} tokens, best {best}")


if __name__ == "__main__":
    main()

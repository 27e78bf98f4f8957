"""What the stage ``sparse`` does for SEA: it fits the estimators, layer by layer, and says how well they guess."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate.errors import InputError
from compress.evalsuite.sliding import context_of
from compress.events import Message, StepDone
from compress.heads.layers import Layers
from compress.job import Job
from compress.model import ModelFacts
from compress.plan import Search, TopK
from compress.schema import Calibration, Sparse
from compress.sparse.sea_file import FILE, Learned
from compress.sparse.sea_finder import sea_budget
from compress.sparse.sea_fit import FitState, Progress, fit, shape_of
from compress.sparse.sea_layer import FitSettings
from compress.sparse.sea_learn import Pace
from compress.sparse.sea_map import attention_map
from compress.sparse.sea_page import sea_page
from compress.tap import Seen
from compress.work import write_text

STATE = "sea-fit.safetensors"
CONTEXT = 8192  # tokens of an estimator, where a model doesn't say how many it reads
PAGE = "estimated_attention.html"
BACKWARD = 3.0  # what a step costs, in passes of an estimator
ESTIMATOR = 2.3e6  # operations of an estimator a token and layer, at 128 to 256 columns


def check_fit(facts: ModelFacts, settings: Sparse, text: Calibration) -> None:
    """Find from the config alone why estimators couldn't be fitted.

    Raises:
        InputError: too few windows, or windows longer than the model reads.
    """
    if text.samples <= settings.sea_held_out:
        problem = f"are all held out by sparse.sea_held_out={settings.sea_held_out}"
        raise InputError("calibration.samples", text.samples, problem, allowed=f"more than {settings.sea_held_out}")
    longest = _length(facts.config)
    if text.seq_len > longest:
        problem = "is longer than the texts that the model reads"
        raise InputError("calibration.seq_len", text.seq_len, problem, allowed=f"at most {longest:,}")


def fit_flops(settings: Sparse, text: Calibration, layers: int) -> float:
    """Operations of a fit."""
    return layers * settings.sea_steps * text.seq_len * ESTIMATOR * BACKWARD


def fit_estimators(
    job: Job, settings: Sparse, search: Search, model: PreTrainedModel, chosen: Mapping[int, Sequence[int]]
) -> Learned:
    """Fit, or go on with it; what is finished of a layer is kept, and of the one in hand what its last check left.

    Args:
        job: the run, with calibration text.
        settings: the section.
        search: the same as the plan has it.
        model: frozen.
        chosen: KV heads that search, by layer.
    """
    assert job.calibration is not None  # the recipe has seen to it
    ids, path = job.calibration.ids, job.folder.path / STATE
    shape = shape_of(model, _length(model.config), settings.sea_width)
    how = FitSettings(
        map=Pace(steps=settings.sea_steps, rate=settings.sea_rate, every=max(1, min(50, settings.sea_steps // 4))),
        budget=sea_budget(TopK(settings.k, settings.method), search),
        held_out=settings.sea_held_out,
        seed=job.report["seed"],
    )
    state = FitState.from_tensors(load_file(path)) if path.exists() else FitState()
    if state.finished:
        job.emit(Message(f"sparse: resumed, estimators of {len(state.finished)} of {len(chosen)} layers are fitted"))
    begun = time.perf_counter()
    for progress in fit(model, ids, shape, how, state, chosen):
        new = len(progress.state.finished) > len(state.finished)
        state = progress.state
        if new or progress.step % how.map.every == 0:
            job.folder.save_tensors(STATE, state.tensors())
        if new:
            now = time.perf_counter()
            job.emit(StepDone(len(state.finished) - 1, len(chosen), now - begun, _told(progress)))
            begun = now
    return Learned.of(model.config, shape, state, chosen)


def learned_report(learned: Learned) -> list[dict[str, Any]]:
    """What every layer's estimator guesses: KL divergence, nats a row, on windows that nothing was learnt from."""
    return [
        {"layer": layer, "heads": list(learned.header.heads[layer])}
        | {name: round(value, 4) for name, value in asdict(figures).items() if math.isfinite(value)}
        for layer, figures in learned.header.figures.items()
    ]


def save_learned(learned: Learned, layers: Layers, ids: Tensor, folder: Path) -> list[Path]:
    """Write what belongs in the artifact: the estimators, and a page that shows what they guess.

    Args:
        learned: the estimators.
        layers: of the model.
        ids: tokens of a text that nothing was learnt from ``[T]``.
        folder: where the files are left.
    """
    learned.save(folder / FILE)
    fitted = learned.layers
    shown = dict.fromkeys((fitted[0], fitted[len(fitted) // 2], fitted[-1]))
    maps = [
        attention_map(learned.estimator(seen.layer), seen.of(learned.header.heads[seen.layer]), head=0)
        for seen in _seen(layers, ids, shown)
    ]
    write_text(folder / PAGE, sea_page(learned, maps, len(ids)))
    return [folder / FILE, folder / PAGE]


def _length(config: Any) -> int:
    """Tokens of the longest text."""
    return context_of(config) or CONTEXT


def _told(progress: Progress) -> str:
    figures = progress.state.finished[progress.layer].figures
    ended = ", ended early: it diverged" if figures.diverged else ""
    told = f"layer {progress.layer}: KL {figures.before:.2f} -> {figures.after:.2f}"
    return f"{told}, a mean map {figures.mean_map:.2f}{ended}"


@torch.no_grad()
def _seen(layers: Layers, ids: Tensor, wanted: Iterable[int]) -> list[Seen]:
    """Queries, keys and values of layers on a text."""
    found: list[Seen] = []
    most = max(wanted)

    def tap(seen: Seen) -> Tensor:
        if seen.layer in wanted:
            found.append(seen)
        return seen.attend()

    with layers.tapped():
        hidden = layers.embed(ids)
        positions = layers.positions(hidden)
        for index in range(most + 1):
            hidden = layers.run(index, hidden, positions, tap)
    return found

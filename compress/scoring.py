"""The scores of ``compress run``: the original and the artifact, before and after."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.eval_inputs import Prepared, prepare_eval
from compress.evaluate import eval_section, score_models
from compress.events import Event, Message, StageDone, StageStarted
from compress.model import ModelView
from compress.planning import Plan
from compress.recipe import Recipe
from compress.runtime import Compute, find


def prepare_scoring(view: ModelView, recipe: Recipe, report: dict[str, Any] | None) -> Prepared | None:
    """Read texts and data, before anything heavy.

    Args:
        view: the original.
        recipe: whose section ``eval`` says what to score.
        report: of an artifact that is complete already, or None.

    Returns:
        What the scoring needs; None where nothing is to be scored, or it was done.

    Raises:
        InputError: a text or a task's data can't be had.
    """
    section = recipe.eval
    if section is None:
        return None
    done = None if report is None else report.get("eval")
    if report is not None and done is not None:
        asked = section.model_dump(mode="json")
        # what `compress prove` measured since stays, unless this run asks for something else than the first one did
        if asked in (done["settings"], report["recipe"]["eval"]):
            return None
    return prepare_eval(section, section.tasks, view.tokenizer())


def score_run(view: ModelView, planned: Plan, prepared: Prepared, emit: Callable[[Event], None]) -> dict[str, Any]:
    """Score the original, then the artifact, one in memory at a time.

    Returns:
        The report's section ``eval``.
    """
    assert planned.recipe.eval is not None
    emit(StageStarted("eval"))
    started = time.perf_counter()
    found = find(planned.out)
    outcome = score_models(
        partial(found.open, Compute(), planned.device),
        partial(_original, view, planned.device),
        view.tokenizer(),
        prepared,
        found.cache,
        told=lambda which, seconds: emit(Message(f"scored the {which} model in {seconds:.0f} s")),
    )
    emit(StageDone("eval", time.perf_counter() - started))
    return eval_section(planned.recipe.eval.model_dump(mode="json"), outcome)


def _original(view: ModelView, device: torch.device) -> PreTrainedModel:
    return view.load_dense().to(device)

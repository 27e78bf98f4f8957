"""The stage ``act``: heads that gain by weaker sinks, written into the attention plan.

It comes last: heads are chosen on the model as it is stored, among those that see everything at 16 bits.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.act.choose import Chosen, choose
from compress.act.measure import Check, Measurer
from compress.act.questions import OPTION, Question, Wanted, task_questions, text_questions
from compress.artifact.kept import kept_bytes
from compress.artifact.packed_checkpoint import stored_view
from compress.calibrate.errors import InputError
from compress.device import pick_dtype
from compress.evalsuite.catalogue import OWN_TASKS, validate_tasks
from compress.evalsuite.sliding import context_of
from compress.events import Message, StageDone, StageStarted
from compress.job import Estimate, Job
from compress.memory import release
from compress.model import ModelFacts
from compress.plan import AttentionPlan, Calibration, Head, Source
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.schema import Act

METHOD = "act"
LEAST = 4  # questions that a t-test can be made of
PASSES = 5  # forward passes that the slopes of an answer cost


class ActStage:
    """Attention calibration, as the section ``act`` of the recipe describes it."""

    name = "act"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        context = context_of(facts.config)
        if context is not None and settings.tokens > context:
            problem = "is longer than the model's context"
            raise InputError("act.tokens", settings.tokens, problem, allowed=f"at most {context:,} tokens")
        if not _layers(facts, settings):
            problem = f"leaves none of the model's {facts.num_layers} layers"
            fix = "lower it, or leave the section act out"
            raise InputError("act.edge_layers", settings.edge_layers, problem, fix=fix)
        if settings.objective == "choice" and not settings.tasks:
            problem = "is a choice among answers, and a text has one"
            raise InputError("act.objective", "choice", problem, fix="name act.tasks, or set act.objective=answer")
        if own := next((name for name in settings.tasks if name in OWN_TASKS), None):
            raise InputError(OPTION, own, "isn't a task of questions with an answer", fix="name lm-eval tasks")
        try:
            validate_tasks(settings.tasks, settings.task_path)
        except InputError as error:
            raise error.under(error.option.replace("eval.", "act.")) from error

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        source = ", ".join(settings.tasks) or f"text of {settings.text}"
        count = settings.items * max(1, len(settings.tasks))
        lines = [
            f"act: sinks behind the first token get {settings.beta:g} of their weight, in those heads of"
            f" {len(_layers(facts, settings))} layers that gain by it, on {count} questions of {source}"
        ]
        tokens = count * (settings.tokens if not settings.tasks else settings.tokens // 4)
        return Estimate(
            lines=lines,
            flops=2.0 * PASSES * tokens * facts.num_params,
            scratch_bytes=0,
            memory_bytes=4 * facts.num_params + 8 * facts.config.hidden_size * settings.tokens * facts.num_layers,
            artifact_bytes=kept_bytes(facts, recipe),
            facts={"questions": count},
        )

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings, facts = _present(job.recipe), job.view.facts
        started = time.perf_counter()
        questions = _questions(job.view.tokenizer(), settings)
        job.emit(StageStarted("act", len(questions), "questions"))
        held_out = round(settings.holdout * len(questions))
        choosing, others = questions[held_out:], questions[:held_out]
        if len(choosing) < LEAST:
            problem = f"are too few to choose heads: {len(choosing)}"
            raise InputError("act.items", settings.items, problem, fix="raise act.items, or lower act.holdout")
        plan = job.plan or AttentionPlan.empty(facts.config)
        candidates = _candidates(plan, _layers(facts, settings))
        how = calibration_of(settings)
        measurer = Measurer(job, _load(job), how, settings.objective == "choice")
        slopes, sinks = measurer.slopes(choosing, len(questions))
        found = choose(slopes, candidates, settings.level)
        by_layer = {layer: sorted(h for own, h in found.heads if own == layer) for layer, _ in found.heads}
        check = measurer.check(others, by_layer, len(choosing)) if found.heads else None
        del measurer
        release()
        kept = bool(found.heads) and (check is None or check.loss.difference < 0)
        if kept:
            job.plan = _written(plan, settings, found, max(len(item.ids) for q in questions for item in q.answers))
        elif settings.holdout and found.heads:
            job.emit(Message("act: the loss isn't lower on questions held out, and nothing is calibrated", "warning"))
        job.report["act"] = report = _report(settings, found, check, kept)
        report |= {"layers": _by_layer(found, slopes, sinks, kept), "questions": _counts(choosing, others)}
        job.emit(Message(report["summary"]))
        job.emit(StageDone("act", time.perf_counter() - started))


def calibration_of(settings: Act) -> Calibration:
    """The section as a plan has it."""
    if settings.threshold is not None:
        return Calibration(settings.beta, settings.threshold)
    return Calibration(settings.beta, settings.alpha, relative=True)


def _present(recipe: Recipe) -> Act:
    assert recipe.act is not None  # the pipeline runs a stage only if its section is there
    return recipe.act


def _layers(facts: ModelFacts, settings: Act) -> list[int]:
    """Layers whose heads may be chosen."""
    sliding = set(AttentionPlan.empty(facts.config).fingerprint.sliding)
    within = range(settings.edge_layers, facts.num_layers - settings.edge_layers)
    return [layer for layer in within if layer not in sliding]


def _candidates(plan: AttentionPlan, layers: Sequence[int]) -> list[tuple[int, int]]:
    """KV heads that see everything at 16 bits, in layers that share nothing."""
    shares = {number: layer.share for number, layer in enumerate(plan.layers) if layer.share is not None}
    sharing = {*shares, *(share.source for share in shares.values())}
    return [
        (layer, head)
        for layer in layers
        if layer not in sharing
        for head, rule in enumerate(plan.layers[layer].heads)
        if replace(rule, calibration=None) == Head()
    ]


def _questions(tokenizer: Any, settings: Act) -> list[Question]:
    """All of them, tasks mixed."""
    if not settings.tasks:
        return text_questions(tokenizer, settings.text, settings.items, settings.tokens, settings.seed)
    wanted = Wanted(settings.tasks, settings.split, settings.task_path, settings.items, settings.tokens, settings.seed)
    found = task_questions(tokenizer, wanted)
    return Random(settings.seed).sample(found, len(found))


def _load(job: Job) -> PreTrainedModel:
    view = job.view if job.result is None else stored_view(job.view, job.result)
    model: PreTrainedModel = view.load_dense(pick_dtype(job.device)).to(job.device)
    return model.requires_grad_(False)


def _written(plan: AttentionPlan, settings: Act, found: Chosen, longest: int) -> AttentionPlan:
    writer = PlanWriter(plan, Source(METHOD, settings.model_dump(mode="json"), seed=settings.seed))
    for layer, head in found.heads:
        writer.calibrate(layer, head, calibration_of(settings))
    writer.score([[round(value, 4) for value in row] for row in found.t.tolist()], longest)
    return writer.finish()


def _report(settings: Act, found: Chosen, check: Check | None, kept: bool) -> dict[str, Any]:
    """The report's section ``act``."""
    told = f"{len(found.heads)} KV heads gain by sinks of {settings.beta:g} of their weight"
    if not found.heads:
        told = "no head gains significantly by weaker sinks; attention is left as it is"
    elif not kept:
        told += ", but not on questions held out; attention is left as it is"
    if check is not None:
        told += f": loss {check.loss.difference:+.4f} on {check.loss.n} questions held out"
        told += "" if check.loss.p_value is None else f" (p = {check.loss.p_value:.2g})"
        if check.right is not None:
            told += f", right answers {check.right.difference:+.1%}"
    return {
        "summary": told,
        "beta": settings.beta,
        "threshold": settings.threshold,
        "alpha": settings.alpha if settings.threshold is None else None,
        "objective": settings.objective,
        "calibrated": kept,
        "heads": [
            {"layer": layer, "head": head, "t": float(found.t[layer, head]), "p": float(found.p[layer, head])}
            for layer, head in found.heads
        ],
        "held_out": None if check is None else asdict(check),
    }


def _by_layer(found: Chosen, slopes: Tensor, sinks: Tensor, kept: bool) -> list[dict[str, Any]]:
    """Sinks and slopes of every layer."""
    means = slopes.mean(0)
    return [
        {
            "layer": layer,
            "sinks": round(float(sinks[:, layer].mean()), 3),
            "slopes": [float(f"{value:.4g}") for value in means[layer].tolist()],
            "calibrated": sorted(head for own, head in found.heads if own == layer) if kept else [],
        }
        for layer in range(len(means))
    ]


def _counts(choosing: Sequence[Question], others: Sequence[Question]) -> dict[str, Any]:
    lengths = torch.tensor([len(question.right.ids) for question in (*choosing, *others)])
    return {
        "choosing": len(choosing),
        "held_out": len(others),
        "sources": sorted({question.source for question in (*choosing, *others)}),
        "median_tokens": int(lengths.median()),
    }

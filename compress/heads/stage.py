"""The stage ``heads``: which KV heads keep every token, measured on the model and written into the attention plan.

It comes after the weights, since heads are to be judged as they will be, and before the KV bits, which then hold for
heads that keep many tokens.
"""

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.artifact.kept import kept_bytes
from compress.artifact.packed_checkpoint import stored_view
from compress.calibrate.errors import InputError
from compress.device import pick_dtype
from compress.evalsuite.sliding import context_of
from compress.events import Message, StageDone, StageStarted
from compress.heads import moa
from compress.heads.methods import METHODS, Found, budget_of, full_layers, rule_of
from compress.heads.profile import HeadProfile
from compress.heads.profiling import Profiler, Subject
from compress.heads.select import dense_bytes, how_many, rank, streaming_plan
from compress.job import Estimate, Job
from compress.memory import release
from compress.model import ModelFacts
from compress.plan import AttentionPlan
from compress.plan_compile import predict_bytes
from compress.recipe import Recipe
from compress.schema import Heads

LENGTHS = (2048, 4096, 8192)  # of which sizes are told
WORDS = {"full": "full", "elastic": "elastic", "stride": "strided", "stream": "streaming"}
BY_PROMPT = ("blend", "influence", "gauss_newton")  # scores whose prompts are kept one by one
PASSES = {"duo": 5, "influence": 5, "blend": 6, "gauss_newton": 26, "moa": 2}
"""Forward passes that a prompt costs, moa beside its influence; any other score takes one."""


class HeadsStage:
    """Streaming heads, as the section ``heads`` of the recipe describes them."""

    name = "heads"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        if not full_layers(facts):
            raise InputError(
                "--model",
                facts.source,
                "every layer of it has a sliding window: no head keeps every token",
                fix="leave the section heads out",
            )
        context = context_of(facts.config)
        if context is not None:
            for key, value in (("lengths", max(settings.lengths)), ("budget_tokens", settings.budget_tokens)):
                if value > context:
                    problem = "is longer than the model's context"
                    raise InputError(f"heads.{key}", value, problem, allowed=f"at most {context:,} tokens")
        if (longest := max(settings.lengths)) <= settings.sink + settings.recent:
            raise InputError(
                "heads.lengths",
                longest,
                f"no prompt is longer than what a streaming head keeps anyway ({settings.sink} + {settings.recent}"
                " tokens), so that heads can't be told apart",
                fix="raise heads.lengths, or lower heads.recent",
            )
        if settings.method == "moa":
            moa.check(settings, facts.config)
        else:
            how_many(facts.config, budget_of(settings))

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        order = rank(torch.zeros(facts.num_layers, facts.config.num_key_value_heads), full_layers(facts))
        count = 0 if settings.method == "moa" else how_many(facts.config, budget_of(settings))
        plan = streaming_plan(facts.config, rule_of(settings), order.heads[:count])
        tokens = settings.items * sum(settings.lengths) * (2 if settings.prompts == "both" else 1)
        passes = tokens * PASSES.get(settings.score, 1)
        if settings.method == "duo":
            passes += PASSES["duo"] * settings.steps * sum(settings.lengths) // len(settings.lengths)
        elif settings.method == "moa":
            passes += tokens * PASSES["moa"]
        weights = 4 * facts.num_params
        kept = 8 * facts.config.hidden_size * max(settings.lengths) * (facts.num_layers + 8)
        return Estimate(
            lines=_lines(facts, settings, plan, count),
            flops=2.0 * passes * facts.num_params,
            scratch_bytes=16 * tokens,
            memory_bytes=weights + kept,
            artifact_bytes=kept_bytes(facts, recipe),
            facts={} if settings.method == "moa" else {"full_heads": count, "bytes": _table(facts, plan, LENGTHS)},
        )

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings, facts = _present(job.recipe), job.view.facts
        started = time.perf_counter()
        job.emit(StageStarted("heads", *_pieces(settings)))

        def load() -> PreTrainedModel:
            view = job.view if job.result is None else stored_view(job.view, job.result)
            model: PreTrainedModel = view.load_dense(pick_dtype(job.device)).to(job.device)
            return model.requires_grad_(False)

        profiler = Profiler(job, Subject(load, job.view.tokenizer(), settings), rule_of(settings))
        found = METHODS[settings.method](profiler, facts, job.plan)
        profile = profiler.profile()
        del profiler
        release()
        job.plan = found.plan
        job.files.append(profile.save(job.folder.path))
        job.report["heads"] = report = _report(facts, settings, job.plan, found, profile)
        for note in found.notes:
            job.emit(Message(note, "warning"))
        job.emit(Message(report["summary"]))
        job.emit(StageDone("heads", time.perf_counter() - started))


def _present(recipe: Recipe) -> Heads:
    assert recipe.heads is not None  # the pipeline runs a stage only if its section is there
    return recipe.heads


def _pieces(settings: Heads) -> tuple[int, str]:
    """What is counted on the way, and how many there are; 0 where nothing is."""
    if settings.method == "duo":
        return settings.steps, "steps"
    if settings.method == "score" and settings.score not in BY_PROMPT:
        return 0, "prompts"
    return settings.items * len(settings.lengths) * (2 if settings.prompts == "both" else 1), "prompts"


def _table(facts: ModelFacts, plan: AttentionPlan, lengths: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Bytes of one sequence's cache by length: at full attention and 16 bits, and as the plan has it."""
    return {
        str(length): {
            "dense": dense_bytes(facts.config, length),
            **asdict(predict_bytes(plan, facts.config, length)),
        }
        for length in lengths
    }


def _lines(facts: ModelFacts, settings: Heads, plan: AttentionPlan, count: int) -> list[str]:
    heads = len(full_layers(facts)) * facts.config.num_key_value_heads
    slides = facts.num_layers - len(full_layers(facts))
    lines = [f"heads: {slides} layers have sliding windows of their own and stay as they are"] if slides else []
    if settings.method == "moa":
        told = f"a window of its own for each of {heads} KV heads, together at most {settings.retention:g} of the cache"
        return [*lines, f"heads: {told} at {settings.budget_tokens:,} tokens"]
    sizes = ", ".join(
        f"{found['stored'] / 1e6:.1f} MB at {int(length):,} tokens ({found['stored'] / found['dense']:.2f} of full)"
        for length, found in _table(facts, plan, LENGTHS).items()
    )
    told = f"{count} of {heads} KV heads keep every token, the others {settings.sink} + {settings.recent}"
    return [*lines, f"heads: {told}, chosen by {_way(settings)}; KV cache of 16 bits {sizes}"]


def _report(
    facts: ModelFacts, settings: Heads, plan: AttentionPlan, found: Found, profile: HeadProfile
) -> dict[str, Any]:
    """The report's section ``heads``."""
    lengths = tuple(sorted({*LENGTHS, settings.budget_tokens}))
    table = _table(facts, plan, lengths)
    at = table[str(settings.budget_tokens)]
    layers = full_layers(facts)
    kept = {layer: sum(head.kind == "full" for head in plan.layers[layer].heads) for layer in layers}
    kinds = Counter(head.kind for layer in layers for head in plan.layers[layer].heads)
    told = ", ".join(f"{kinds[kind]} {WORDS[kind]}" for kind in WORDS if kinds[kind])
    return {
        "method": settings.method,
        "score": settings.score,
        "summary": f"{_way(settings)}: KV heads {told}; {at['stored'] / at['dense']:.3f} of the cache at "
        f"{settings.budget_tokens:,} tokens",
        "retention": at["stored"] / at["dense"],
        "bytes": table,
        "layers": [{"layer": layer, "full": count, "chart": _chart(plan, layer)} for layer, count in kept.items()],
        "prompts": profile.items,
        "notes": list(found.notes),
        "seconds": profile.seconds,
        **found.facts,
    }


def _way(settings: Heads) -> str:
    """By what heads are chosen."""
    return settings.method if settings.method != "score" else settings.score


def _chart(plan: AttentionPlan, layer: int) -> str:
    """A letter a head, as in :meth:`AttentionPlan.lines`."""
    return "".join(head.kind[0].upper() for head in plan.layers[layer].heads)

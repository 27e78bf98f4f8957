"""What each method of the section ``heads`` does with a profiler, and what comes of it."""

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from compress.heads.profiling import Profiler
from compress.heads.select import Budget, Ranking, how_many, rank, stream
from compress.model import ModelFacts
from compress.plan import AttentionPlan, Source, Window
from compress.plan_writer import PlanWriter, Rule
from compress.schema import Heads

STEP = 0.01  # of gates that aren't told apart: what the last steps of the optimisation move them by


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        plan: what it wrote behind what others had written.
        notes: what a user has to be told.
        facts: of the method alone, for the report.
    """

    plan: AttentionPlan
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def rule_of(settings: Heads) -> Rule:
    """What a streaming head sees."""
    return Rule(settings.sink, Window(a=settings.recent, b=0.0))


def budget_of(settings: Heads) -> Budget:
    """The bytes that may be stored."""
    return Budget(settings.retention, settings.budget_tokens, rule_of(settings))


def full_layers(facts: ModelFacts) -> tuple[int, ...]:
    """The layers that attend to everything; a plan leaves the others alone."""
    return tuple(layer for layer in range(facts.num_layers) if facts.window(layer) is None)


def by_score(profiler: Profiler, facts: ModelFacts, start: AttentionPlan | None) -> Found:
    """The heads with the highest score keep every token."""
    scores = profiler.score(profiler.subject.settings.score)
    return Found(*_threshold(profiler, facts, rank(scores, full_layers(facts)), scores, start))


def by_duo(profiler: Profiler, facts: ModelFacts, start: AttentionPlan | None) -> Found:
    """The heads with the highest gates keep every token; among equal gates a score decides."""
    settings, layers = profiler.subject.settings, full_layers(facts)
    count = how_many(facts.config, budget_of(settings))
    share = count / (len(layers) * facts.config.num_key_value_heads)
    second = profiler.score(settings.score)
    gates = profiler.gates(share if settings.adapt else None)
    ranking = rank(gates.values, layers, second, STEP)
    last = gates.history[-1]
    tenth = max(1, len(gates.history) // 10)
    own = {
        "steps": len(gates.history),
        "target": share if settings.adapt else None,
        "loss": sum(step.loss for step in gates.history[-tenth:]) / tenth,
        "mean_gate": last.mean,
        "penalty": last.penalty,
        "losses": [round(step.loss, 6) for step in gates.history],
    }
    return Found(*_threshold(profiler, facts, ranking, gates.values, start), own)


def by_moa(profiler: Profiler, facts: ModelFacts, start: AttentionPlan | None) -> Found:
    """Every head has a window of its own, chosen by a programme."""
    from compress.heads.moa import spans  # which gives what is defined here

    return spans(profiler, facts, start)


METHODS = {"score": by_score, "duo": by_duo, "moa": by_moa}


def writer_of(profiler: Profiler, facts: ModelFacts, start: AttentionPlan | None) -> PlanWriter:
    """A writer under the method's name, behind what others have written."""
    settings = profiler.subject.settings
    name = settings.score if settings.method == "score" else settings.method
    arguments = settings.model_dump(mode="json")
    prompts = profiler.profile().items
    source = Source(name, arguments, prompts, seed=settings.seed, tool_version=version("compress"))
    return PlanWriter(start or AttentionPlan.empty(facts.config), source)


def _threshold(
    profiler: Profiler, facts: ModelFacts, ranking: Ranking, scores: Tensor, start: AttentionPlan | None
) -> tuple[AttentionPlan, tuple[str, ...]]:
    """The first of a ranking keep every token, as many as the budget holds."""
    settings = profiler.subject.settings
    count = how_many(facts.config, budget_of(settings))
    writer = writer_of(profiler, facts, start)
    stream(writer, facts.config, rule_of(settings), ranking.heads[:count])
    writer.score(scores.tolist(), max(settings.lengths))
    budget = {"metric": "kv_bytes", "retention": settings.retention, "tokens": settings.budget_tokens}
    return replace(writer.finish(), budget=budget), ranking.notes

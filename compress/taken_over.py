"""What an artifact's attention plan brings to a run that leaves its weights as they are.

A section of the recipe replaces what was written under its name; everything else that the plan says stays, so that KV
bits are added to streaming heads, or streaming heads to KV bits. Bytes are counted behind all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compress.artifact.export import read_report
from compress.calibrate.disk import sha256
from compress.calibrate.errors import InputError
from compress.heads.profile import FILE as HEAD_PROFILE
from compress.job import Job
from compress.kv.stage import recounted
from compress.plan import FILE as PLAN
from compress.plan import AttentionPlan, Head, Window
from compress.recipe import Recipe
from compress.sparse.packing import check_packed
from compress.sparse.sea_file import FILE as SEA
from compress.sparse.sea_file import read_whole_plan

WRITES = {"heads": "window", "sparse": "topk", "kv": "kv", "act": "calibration"}
"""The part of a plan that each section writes."""

CALIBRATED_BEFORE = ("share", "heads", "sparse", "kv")
"""Sections that take back the calibration of attention that an artifact brings."""

_NOTHING: Mapping[str, dict[str, Any]] = {
    "window": {"sink": 0, "window": Window(), "stride": None},
    "topk": {"topk": None},
    "kv": {"kv": None},
    "calibration": {"calibration": None},
}
"""What a head has where nobody wrote a part."""


@dataclass(frozen=True)
class TakenOver:
    """What a run begins with.

    Attributes:
        plan: what the artifact's plan says beside what the recipe's sections will write; None if it says nothing.
        sections: of the artifact's report, about what is kept of its plan.
        files: that belong to it.
        notes: what a user has to be told.
    """

    plan: AttentionPlan | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def taken_over(folder: Path, recipe: Recipe, config: PreTrainedConfig) -> TakenOver:
    """What holds of the artifact in a folder, nothing where there is none.

    Args:
        folder: of the model.
        recipe: whose sections replace what they write.
        config: of the model.

    Raises:
        InputError: a plan for another model; one whose heads search, where the recipe has heads drop tokens.
    """
    former = read_whole_plan(folder, config) if folder.is_dir() else None
    if former is None:
        return TakenOver()
    former.check(config)
    if recipe.weights is not None:
        note = "the attention plan of the model was made for other weights, and isn't taken over"
        return TakenOver(notes=(note,))
    kept = {name: part for name, part in WRITES.items() if getattr(recipe, name) is None and part in former.writers}
    if any(getattr(recipe, name) is not None for name in CALIBRATED_BEFORE):
        kept.pop("act", None)  # which is chosen last, for heads that nothing else holds for
    _refuse(folder, recipe, kept, former)
    plan = former
    for name, part in WRITES.items():
        if name not in kept:
            plan = without(plan, part)
    if not plan.writers:
        return TakenOver()
    report = read_report(folder) or {}
    profile = folder / HEAD_PROFILE
    told = ", ".join(f"{part} by {writer}" for part, writer in plan.writers.items())
    return TakenOver(
        plan,
        {name: report[name] for name in kept if name in report},
        tuple(
            path
            for section, path in (("heads", profile), ("sparse", folder / SEA))
            if section in kept and path.is_file()
        ),
        (f"attention plan of the model: kept is {told}",),
    )


def recount(job: Job) -> None:
    """Tell the bytes of KV bits that were there before heads in the report behind both."""
    if job.plan is not None and job.recipe.heads is not None and job.recipe.kv is None and "kv" in job.report:
        job.report["kv"] = recounted(job.report["kv"], job.view.facts, job.plan)


def plan_mark(folder: Path, recipe: Recipe) -> dict[str, str]:
    """What tells a run that begins with one plan from one that begins with another; empty where there is none."""
    path = folder / PLAN
    return {"plan": sha256(path)} if recipe.weights is None and path.is_file() else {}


def _refuse(folder: Path, recipe: Recipe, kept: Mapping[str, str], former: AttentionPlan) -> None:
    """Raise for what doesn't go together before anything is measured; the plan's writer would at the end."""
    if "sparse" in kept and recipe.heads is not None:
        problem = (
            f"its plan, by {former.writers[kept['sparse']]}, searches for far tokens, and the section heads drops them"
        )
        raise InputError("--model", folder, problem, fix="add --set sparse=hip")
    if "sparse" in kept and recipe.kv is not None and former.search is not None:
        (method, *_) = former.searches
        check_packed(method, former.search.sink, former.search.window, recipe.kv)
    if "kv" in kept and recipe.sparse is not None and former.packing is not None:
        check_packed(recipe.sparse.method, recipe.sparse.sink, recipe.sparse.window, former.packing)


def without(plan: AttentionPlan, part: str) -> AttentionPlan:
    """The plan as if nobody had written a part, its heads in the checkpoint's order."""
    nothing = _NOTHING[part]
    layers = tuple(
        replace(layer, heads=tuple(_reset(head, nothing) for head in layer.heads), perm=None) for layer in plan.layers
    )
    writers = {name: writer for name, writer in plan.writers.items() if name != part}
    return replace(
        plan,
        layers=layers,
        writers=writers,
        packing=None if part == "kv" else plan.packing,
        search=None if part == "topk" else plan.search,
        estimators=None if part == "topk" else plan.estimators,
        budget=None if part == "window" else plan.budget,
        sources=tuple(source for source in plan.sources if source.method in writers.values()),
        scores={name: rows for name, rows in plan.scores.items() if name in writers.values()},
    )


def _reset(head: Head, fields: dict[str, Any]) -> Head:
    return replace(head, **fields)

"""``compress plan``: what a run would do, from the config alone, and every problem that can be found that early."""

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.act.stage import ActStage
from compress.artifact.account import Destination
from compress.artifact.export import read_report
from compress.artifact.packed_checkpoint import check_carried, is_packed_artifact, open_packed
from compress.artifact.preflight import check_export, export_notes
from compress.artifact.target import Target, check_push
from compress.calibrate.errors import InputError
from compress.calibrate.source import Request, check_source
from compress.device import pick_device
from compress.eval_inputs import check_eval
from compress.evalsuite.sliding import context_of
from compress.heads.stage import HeadsStage
from compress.job import Estimate, Stage
from compress.kv.stage import KVStage
from compress.model import ModelFacts, open_config
from compress.options import RunOptions
from compress.recipe import Recipe
from compress.share.stage import ShareStage
from compress.sparse.stage import SparseStage
from compress.taken_over import taken_over
from compress.weights.stage import WeightsStage
from compress.work import partial_folder

STAGES: tuple[Stage, ...] = (ShareStage(), WeightsStage(), HeadsStage(), SparseStage(), KVStage(), ActStage())
LIBRARIES_BYTES = 550 << 20  # what Python, torch and transformers occupy before a model is opened
EFFICIENCY = 0.5  # of the speed of a large matrix product that a whole run reaches; measured, docs/log.md


@dataclass(frozen=True)
class Plan:
    """A run before it happens.

    Attributes:
        facts: the model.
        recipe: resolved.
        out: where the artifact would stand.
        device: where it would run.
        estimates: of every stage, by name.
        seconds: of the stages together, a guess from a short matrix product on this machine.
        target: where the artifact is pushed at the end, if it is.
    """

    facts: ModelFacts
    recipe: Recipe
    out: Path
    device: torch.device
    estimates: dict[str, Estimate]
    seconds: float
    target: Target | None = None

    @property
    def artifact_bytes(self) -> int:
        """Size of the weights that the run leaves behind."""
        return max((estimate.artifact_bytes for estimate in self.estimates.values()), default=0)

    @property
    def memory_bytes(self) -> int:
        """Peak of resident memory."""
        stages = max((estimate.memory_bytes for estimate in self.estimates.values()), default=0)
        return LIBRARIES_BYTES + max(stages, 4 * self.facts.num_params)

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "model": self.facts.source,
            "family": self.facts.family.name,
            "layers": self.facts.num_layers,
            "parameters": self.facts.num_params,
            "checkpoint_bytes": self.facts.checkpoint_bytes,
            "out": str(self.out),
            "device": str(self.device),
            "artifact_bytes": self.artifact_bytes,
            "bits_per_weight": round(self.artifact_bytes * 8 / self.facts.num_params, 3),
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": round(self.seconds),
            "stages": {name: estimate.facts for name, estimate in self.estimates.items()},
            "notes": self.notes(),
            "push": None if self.target is None else self.target.url,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    @property
    def disk_bytes(self) -> int:
        """Disk space that the run needs while it works."""
        formats = self.recipe.export.formats
        copies = len(formats) + ("gptq" in formats)  # its parts are converted before they are joined
        return copies * self.artifact_bytes + sum(estimate.scratch_bytes for estimate in self.estimates.values())

    def notes(self) -> list[str]:
        """What was chosen automatically and why, and what to be warned of."""
        lines = [line for estimate in self.estimates.values() for line in estimate.lines]
        lines += export_notes(self.facts, self.recipe)
        return lines + [f"warning: {warning}" for warning in self.recipe.warnings()]

    def lines(self) -> list[str]:
        """For a terminal."""
        facts, config = self.facts, self.facts.config
        heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {facts.head_dim}"
        lines = [
            f"model      {facts.name} ({facts.family.name}): {facts.num_layers} layers, hidden {config.hidden_size}, "
            f"{heads}, "
            f"{'tied' if facts.tied else 'untied'} head, {facts.num_params / 1e6:.1f}M parameters, "
            f"{facts.checkpoint_bytes / 1e6:.1f} MB",
            f"recipe     {self.recipe.name}: {self.recipe.description}",
        ]
        shapes = ", ".join(f"{role} {f.out_features}x{f.in_features}" for role, f in facts.linears(0).items())
        lines.append(f"layer      {shapes}")
        if (calibration := self.recipe.calibration) is not None:
            windows = f"{calibration.samples} x {calibration.seq_len} tokens"
            lines.append(f"text       {windows} from {calibration.source}, seed {calibration.seed}")
        lines += [f"weights    {note}" for note in self.notes()]
        if self.recipe.eval is not None:
            lines.append(f"score      {', '.join(self.recipe.eval.tasks)}, before and after")
        bits = self.artifact_bytes * 8 / facts.num_params
        lines += [
            f"artifact   {self.out}: about {self.artifact_bytes / 1e6:.1f} MB, {bits:.2f} bits a weight",
            f"needs      about {self.memory_bytes / 1e9:.1f} GB of memory, {self.disk_bytes / 1e9:.2f} GB of disk, "
            f"{_duration(self.seconds)} on {self.device} without calibration text and scoring",
        ]
        if self.target is not None:
            lines.append(f"push       {self.target}")
        return lines


def plan(
    model: str, recipe: "str | Recipe | dict[str, Any]", options: RunOptions | None = None, out: Path | None = None
) -> Plan:
    """What :func:`compress.run` would do. Reads the config and file headers, no weights, no text.

    Raises:
        InputError: everything about model, recipe and machine that can be found to be wrong this early.
    """
    options = options or RunOptions()
    resolved = Recipe.load(recipe, options.overrides())
    device = pick_device(options.device)
    if carries(model, resolved):
        check_carried(model, resolved)
        facts = open_packed(model).facts
    else:
        facts = open_config(model)
    stages = active_stages(resolved)
    for stage in stages:
        stage.preflight(facts, resolved)
    taken_over(Path(model).expanduser(), resolved, facts.config)
    check_export(facts, resolved)
    if (calibration := resolved.calibration) is not None:
        check_source(Request(calibration.source, calibration.column))
    if resolved.eval is not None:
        check_eval(resolved.eval, resolved.eval.tasks, context_of(facts.config))
    estimates = {stage.name: stage.estimate(facts, resolved) for stage in stages}
    seconds = sum(estimate.flops for estimate in estimates.values()) / (EFFICIENCY * _flops_per_second(device))
    planned = Plan(facts, resolved, (out or default_out(facts, resolved)).absolute(), device, estimates, seconds)
    check_out(planned)
    if options.push is None:
        if options.public:
            raise InputError("--public", None, "says who may see what is pushed, and there is no --push")
        return planned
    return replace(planned, target=check_push(Destination(options.push, options.public, option="--push"), resolved))


def carries(model: str, recipe: Recipe) -> bool:
    """Whether the packed weights of an artifact are taken over as they are."""
    return recipe.weights is None and is_packed_artifact(model)


def active_stages(recipe: Recipe) -> list[Stage]:
    """The stages whose section is in the recipe, in order.

    Raises:
        InputError: there is none.
    """
    stages = [stage for stage in STAGES if getattr(recipe, stage.name) is not None]
    if not stages:
        names = ", ".join(stage.name for stage in STAGES)
        raise InputError("--recipe", recipe.name, "does nothing: it has no section of a method", allowed=names)
    return stages


def default_out(facts: ModelFacts, recipe: Recipe) -> Path:
    """``MODEL-RECIPE-W3A16-G64`` in the current folder."""
    source = Path(facts.source)  # the name inside a GGUF file is often not the one people know
    name = source.stem if source.suffix == ".gguf" else Path(facts.name).name.replace(" ", "-")
    parts = [name, recipe.name]
    if recipe.weights is not None:
        size = recipe.weights.group_size
        parts.append(f"W{recipe.weights.bits}A16")
        parts += [f"G{size}"] if isinstance(size, int) and size > 0 else []
        parts += [] if recipe.share is None else [recipe.share.method]
        parts += [] if recipe.heads is None else [recipe.heads.method]
        parts += [] if recipe.sparse is None else [recipe.sparse.method]
        parts += [] if recipe.kv is None else [recipe.kv.method]
        parts += [] if recipe.act is None else ["act"]
    return Path("-".join(parts))


def check_out(planned: Plan) -> None:
    """Find out whether the artifact can be written at all.

    Raises:
        InputError: the folder holds something else, can't be written to, or the disk is too full.
    """
    out = planned.out
    if out.exists() and read_report(out) is None and (not out.is_dir() or any(out.iterdir())):
        raise InputError("--out", out, "exists and isn't an artifact", fix="choose another folder")
    parent = next(folder for folder in [out.parent, *out.parents] if folder.exists())
    if not parent.is_dir():
        raise InputError("--out", out, f"{parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError("--out", out, f"{parent} can't be written to", fix="choose another folder")
    if read_report(out) is not None:
        return
    work = partial_folder(out)
    kept = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0
    free = shutil.disk_usage(parent).free + kept
    if free < planned.disk_bytes:
        raise InputError(
            "--out",
            out,
            f"the run needs {planned.disk_bytes / 1e9:.2f} GB of disk and {parent} has {free / 1e9:.2f} GB free",
            fix="free some, or choose a folder on another disk",
        )


def _flops_per_second(device: torch.device) -> float:
    """Speed of a float32 matrix product of 1024 x 1024, the best of three."""
    a = torch.randn(1024, 1024, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _ = float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )

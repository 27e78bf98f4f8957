"""The stage ``share``: layers that take attention, or keys and values, from an earlier one, fitted and trained for it.

It comes first, since what it changes is the model's structure: weights are quantized, heads chosen and caches packed
behind it.
"""

import math
import time
from typing import Any

from compress.artifact.kept import kept_bytes
from compress.artifact.shared import check_shared, hand_over, taken_up
from compress.calibrate.errors import InputError
from compress.evalsuite.perplexity import perplexity
from compress.events import Every, Message, StageDone, StageStarted
from compress.job import Estimate, Job
from compress.memory import release
from compress.model import ModelFacts, ModelView
from compress.plan import AttentionPlan, Share, Source
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.schema import Calibration, Sharing
from compress.share import distill_text
from compress.share.distill_settings import Distillation
from compress.share.pairs import MODES, candidates, named
from compress.share.sharing import STATE, WINDOWS, Sharer
from compress.share.similarity import FIRST_ROW
from compress.share.told import TAKEN, found_told, layers_told, way

LEAST_ROWS = 2  # tokens of text for every input of an output projection that is fitted


class ShareStage:
    """Shared attention, as the section ``share`` of the recipe describes it."""

    name = "share"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        settings, text = _present(recipe)
        check_shared(recipe)
        if facts.packed or facts.shares:
            what = "its weights are packed" if facts.packed else "its layers share already"
            raise InputError(
                "--model",
                facts.source,
                f"{what}, and the section share changes weights as they were",
                fix="give the model that it was made of",
            )
        if settings.pairs:
            named(facts, settings.pairs)
        elif not candidates(facts, settings).consumers:
            problem = f"no layer of the model's {facts.num_layers} is left that may take from another"
            allowed = f"at most {max(2, facts.num_layers - settings.last - 2)}"
            raise InputError("share.first", settings.first, problem, allowed=allowed, fix="lower share.last or first")
        _check_rank(facts, settings)
        _check_text(facts, settings, text)
        if settings.distill:
            distill_text.check_text(distillation(settings), _windows(settings, text), text.seq_len)

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        settings, text = _present(recipe)
        found = candidates(facts, settings)
        count = len(settings.pairs) or min(found.limit, len(found.consumers))
        chosen = "as the recipe names them" if settings.pairs else way(settings)
        taken = f"{count} of {facts.num_layers} layers take {TAKEN[MODES[settings.method]]} of an earlier one"
        lines = [f"share: at most {taken}, {chosen}; refit: {settings.refit}"]
        windows, tries = _windows(settings, text), 0
        if settings.method == "echoatt" and settings.choose == "search" and not settings.pairs:
            tries = len(found.consumers) + 3 * count  # measured: docs/log.md
        held = settings.check_windows * text.seq_len
        passes = (2 * windows + WINDOWS) * text.seq_len + tries * held
        files = 2 * len(found.layers) * min(windows, settings.search_windows) if tries else 3 * count * windows
        return Estimate(
            lines=lines,
            flops=2.0 * passes * facts.num_params,
            scratch_bytes=4 * files * text.seq_len * facts.config.hidden_size + 8 * facts.num_params,
            memory_bytes=(8 if settings.distill else 4) * facts.num_params + (1 << 28),
            artifact_bytes=kept_bytes(facts, recipe),
            facts={"layers": count, "mode": MODES[settings.method]},
        )

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings, _ = _present(job.recipe)
        started = time.perf_counter()
        job.emit(StageStarted("share", WINDOWS if settings.method == "echoatt" else 0, "windows of similarity"))
        state = job.folder.stage(STATE)
        shares = taken_up(job)
        if shares is None:
            shares = _shared(job, settings)
        else:
            job.emit(Message("share: resumed, the layers are done"))
        job.report["share"] = report = dict(state["report"])
        if shares:
            job.plan = _plan(job, settings, shares)
        report["seconds"] = round(state.setdefault("seconds", 0.0), 1)
        job.emit(Message(report["summary"], "info" if shares else "warning"))
        job.emit(StageDone("share", time.perf_counter() - started))


def distillation(settings: Sharing) -> Distillation:
    """The section's keys that begin with ``distill_``."""
    return Distillation(**{name: getattr(settings, f"distill_{name}") for name in _DISTILL})


_DISTILL = tuple(name.removeprefix("distill_") for name in Sharing.model_fields if name.startswith("distill_"))


def _shared(job: Job, settings: Sharing) -> dict[int, Share]:
    """Choose, fit, train, hand over, and leave the report in the stage's state."""
    state, began = job.folder.stage(STATE), time.perf_counter()
    dense = job.view
    model = dense.load_dense().to(job.device).requires_grad_(False)
    sharer = Sharer(job, settings, model)
    similarity = sharer.similarity() if settings.method == "echoatt" else None
    chosen = sharer.chosen(similarity)
    report: dict[str, Any] = {"protected": state.get("protected", [])}
    shares: dict[int, Share] = {}
    if chosen:
        shares, fits = sharer.fit(chosen, similarity)
        report["decode"] = sharer.times(shares, fits)
        sharer.apply(shares, fits)
        if settings.distill:
            report["distillation"] = _distilled(job, settings, sharer, shares, dense)
            state["losses"]["trained"] = math.log(_perplexity(sharer))
        report["layers"] = layers_told(shares, fits, similarity)
    report |= found_told(dense, settings, state, shares, similarity)
    state["report"] = report
    state["seconds"] = state.get("seconds", 0.0) + time.perf_counter() - began
    if shares:
        hand_over(job, model, shares)
    job.folder.save()
    del model, sharer
    release()
    return shares


def _distilled(
    job: Job, settings: Sharing, sharer: Sharer, shares: dict[int, Share], dense: ModelView
) -> dict[str, Any]:
    """Train the model that shares; what the trainer tells."""
    from compress.share.trainer import Task  # accelerate takes a second, which a plan shouldn't wait
    from compress.share.trainer_launch import distil

    asked, seed = distillation(settings), job.report["seed"]
    ids, origin = distill_text.windows(asked, dense, sharer.text.fit, seed, Every(10, job.emit))
    teacher = dense.load_dense().to(job.device).requires_grad_(False)
    task = Task(sharer.model, teacher, shares, ids, seed)
    trained = distil(task, asked, job.folder.path / "distill", job.emit, dense.facts.source)
    del teacher
    release()
    return {"text": origin, **trained.report}


def _perplexity(sharer: Sharer) -> float:
    held = sharer.text.held
    return perplexity(sharer.model, held.flatten().to(sharer.model.device), window=held.shape[1]).value


def _plan(job: Job, settings: Sharing, shares: dict[int, Share]) -> AttentionPlan:
    writer = PlanWriter(
        job.plan or AttentionPlan.empty(job.view.config), Source(settings.method, settings.model_dump(mode="json"))
    )
    for layer, share in sorted(shares.items()):
        writer.share(layer, share)
    return writer.finish()


def _check_rank(facts: ModelFacts, settings: Sharing) -> None:
    """Whether scores can be corrected.

    Raises:
        InputError: they can't.
    """
    rank = settings.score_rank
    if rank > facts.head_dim:
        allowed = f"at most {facts.head_dim}, the channels of a head"
        raise InputError("share.score_rank", rank, "is more than a head has", allowed=allowed)
    if rank and facts.family.qk_norm:
        problem = "keeps some channels of queries and keys, and this family's norms of them need all"
        raise InputError("share.score_rank", rank, problem, allowed="0 for this model")


def _check_text(facts: ModelFacts, settings: Sharing, text: Calibration) -> None:
    """Whether the calibration text is enough.

    Raises:
        InputError: it isn't.
    """
    left = _windows(settings, text)
    if left < 1:
        problem = f"are all held out by share.check_windows={settings.check_windows}"
        raise InputError("calibration.samples", text.samples, problem, allowed=f"more than {settings.check_windows}")
    if settings.method == "echoatt" and text.seq_len <= 2 * FIRST_ROW:
        problem = f"is too short to compare attention on: rows before {FIRST_ROW} see too few tokens"
        raise InputError("calibration.seq_len", text.seq_len, problem, allowed=f"more than {2 * FIRST_ROW}")
    if settings.refit == "none":
        return
    width = facts.linears(0)["o"].in_features
    searching = settings.method == "echoatt" and settings.choose == "search" and not settings.pairs
    used = min(left, settings.search_windows) if searching else left
    if used * text.seq_len < LEAST_ROWS * width:
        needed = -(-LEAST_ROWS * width // text.seq_len)
        option = "share.search_windows" if used < left else "calibration.samples"
        raise InputError(
            option,
            used if used < left else text.samples,
            f"gives {used * text.seq_len:,} tokens to fit projections of {width:,} inputs on",
            allowed=f"at least {needed if used < left else needed + settings.check_windows:,}",
        )


def _windows(settings: Sharing, text: Calibration) -> int:
    """Windows that aren't held out."""
    return text.samples - settings.check_windows


def _present(recipe: Recipe) -> tuple[Sharing, Calibration]:
    assert recipe.share is not None  # the pipeline runs a stage only if its section is there
    assert recipe.calibration is not None  # the recipe has seen to it
    return recipe.share, recipe.calibration

"""The whole job: preflight, calibration text, stages, artifact, reload check, scores, report.

Nothing of the artifact's folder exists until it is complete: work goes into ``OUT.partial`` and is moved at the end.
Scores come after that, since they can't change the weights and shouldn't be able to lose them.
"""

import errno
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.artifact.account import Destination
from compress.artifact.check import check_reload
from compress.artifact.export import read_report, write_artifact
from compress.artifact.gguf_tokenizer import tokenizer_metadata
from compress.artifact.inspect import changed_files
from compress.artifact.kept import keep
from compress.artifact.packed_checkpoint import open_packed
from compress.calibrate.errors import InputError
from compress.calibrate.selfgen import fast_dtype
from compress.calibrate.source import AUTO, SELF, Model, Request, prepare
from compress.calibrate.text import is_local
from compress.calibrate.windows import CalibrationSet
from compress.events import Event, Every, Message, StageDone, StageStarted
from compress.job import Job, Result
from compress.memory import release
from compress.model import ModelFacts, ModelView, open_model
from compress.options import RunOptions
from compress.origin import origin_of
from compress.plan_order import side_by_side
from compress.planning import Plan, active_stages, carries, plan
from compress.recipe import Recipe
from compress.scoring import prepare_scoring, score_run
from compress.taken_over import plan_mark, recount, taken_over
from compress.work import WorkFolder, changed, refuse_other_run, sweep

__all__ = ["RunResult", "plan", "run"]

SCHEMA = "compress.report/1"
SO_FAR = "seconds_so_far"  # in the report of an artifact that is published and not yet scored
DECIDING = {"calibration", "share", "weights", "heads", "sparse", "kv", "act", "export"}  # they decide the artifact
LIBRARIES = ("torch", "transformers", "compressed-tensors", "lm-eval")


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        out: the artifact.
        report: the content of its ``report.json``.
        summary: at most twelve lines for a terminal.
        ok: whether every quality gate of the recipe was passed, and the artifact is where it was to be pushed.
        url: its repository on the Hub, if it was pushed.
    """

    out: Path
    report: dict[str, Any]
    summary: list[str]
    ok: bool = True
    url: str | None = None


def run(
    model: str,
    recipe: "str | Recipe | dict[str, Any]",
    *,
    out: Path | str | None = None,
    options: RunOptions | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Compress a model: ``compress run`` in Python.

    Args:
        model: a Hub id, a folder with safetensors, or a ``.gguf`` file.
        recipe: a shipped name, the path of a YAML file, a mapping of the same content, or a recipe.
        out: folder of the artifact; by default named after model and recipe, in the current folder.
        options: overrides and where to run.
        on_event: told what happens, see ``compress.events``.

    Returns:
        The finished run. The same call again finds the artifact complete and returns at once.

    Raises:
        InputError: what the user can mend, before anything heavy.
        RuntimeError: the reloaded artifact isn't the model in memory; nothing is published.
    """
    options = options or RunOptions()
    emit = on_event or _ignore
    started = time.perf_counter()
    planned = plan(model, recipe, options, None if out is None else Path(out))
    if options.dry_run:
        return RunResult(planned.out, planned.to_json(), planned.lines())
    for note in planned.notes():
        emit(Message(note))
    view = _open(model, planned.recipe, options.trust_remote_code)
    if "gguf" in planned.recipe.export.formats:
        tokenizer_metadata(view)  # refused now rather than at the end
    report = read_report(planned.out) if planned.out.exists() else None
    if report is not None:
        _check_finished(report, planned, view)
        emit(Message(f"{planned.out} is complete already; remove it to make it again"))
        sweep(planned.out)
    scoring = prepare_scoring(view, planned.recipe, report)
    if report is None:
        report = _compress(planned, view, options.resume, started, emit)
        started = time.perf_counter()  # what was before is in the report
    if scoring is not None or report["seconds"] is None:  # None: the first run, or one killed after publication
        scores = {} if scoring is None else {"eval": score_run(view, planned, scoring, emit)}
        report = _finish(planned.out, report, scores, started, emit)
    lines = summary(planned.out, report)
    if planned.target is None:
        return RunResult(planned.out, report, lines)
    url, line = _push(planned.out, planned.target.destination, emit)
    return RunResult(planned.out, report, [*lines[:-1], line], ok=url is not None, url=url)


def _open(model: str, recipe: Recipe, trust_remote_code: bool) -> ModelView:
    """The model to read from, an artifact of ours too where its weights stay as they are.

    Raises:
        InputError: as :func:`compress.model.open_model`; a damaged artifact.
    """
    if not carries(model, recipe):
        return open_model(model, trust_remote_code)
    view = open_packed(model, trust_remote_code)
    if changed := changed_files(view.path):
        raise InputError("--model", model, f"is damaged: {', '.join(changed)} changed since it was written")
    return view


def _push(out: Path, destination: Destination, emit: Callable[[Event], None]) -> tuple[str | None, str]:
    """Put the finished artifact on the Hub; a failure is told and not raised, for the artifact is complete.

    Returns:
        The repository's address, None if it failed, and a line for the summary.
    """
    from compress.artifact.hub import plan_push, send

    emit(StageStarted("push"))
    started = time.perf_counter()
    try:
        planned = plan_push(out, destination)
        for line in planned.lines():
            emit(Message(line))
        pushed = send(planned)
    except InputError as error:
        emit(Message(f"not pushed: {error}", "warning"))
        again = f"compress push {shlex.quote(str(out))} {destination.repo}{' --public' if destination.public else ''}"
        return None, f"push     FAILED ({error.problem}); the artifact is complete: {again}"
    emit(StageDone("push", time.perf_counter() - started))
    return pushed.url, f"push     {pushed.url}: compress generate {destination.repo} --prompt 'Hello'"


def _finish(
    out: Path, former: dict[str, Any], scores: dict[str, Any], started: float, emit: Callable[[Event], None]
) -> dict[str, Any]:
    """Add scores and the time to a published artifact's report.

    Args:
        out: the artifact.
        former: its report until now.
        scores: the section ``eval``, or nothing.
        started: when this process began with what the report's time doesn't hold.
        emit: told if the card was edited by hand.

    Returns:
        The report.
    """
    from compress.report_page import write_report  # matplotlib takes a second, which a plan shouldn't wait

    kept = {key: value for key, value in former.items() if key != SO_FAR}
    spent = former.get(SO_FAR) or former["seconds"] or 0.0
    report = kept | scores | {"seconds": round(spent + time.perf_counter() - started, 1)}
    if note := write_report(out, report, former):
        emit(Message(note))
    return report


def _compress(
    planned: Plan, view: ModelView, resume: bool, started: float, emit: Callable[[Event], None]
) -> dict[str, Any]:
    """Everything up to publication; returns the report."""
    kept = refuse_other_run(planned.out, _fingerprint(planned, view)) if resume else None
    calibration = _calibration(view, planned.recipe, _source_of(kept), emit)
    former = taken_over(view.path, planned.recipe, view.config)
    for note in former.notes:
        emit(Message(note))
    report = _begin_report(planned, view, calibration) | former.sections
    with WorkFolder(planned.out, report["fingerprint"], resume, started) as folder:
        try:
            job = Job(view, planned.recipe, calibration, folder, planned.device, emit, report)
            job.plan, job.files = former.plan, [*former.files]
            _make(job)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fix = "free some space and give the same command again: every finished layer is kept"
            raise InputError("--out", planned.out, "the disk is full", fix=fix) from error
    return report


def _check_finished(finished: dict[str, Any], planned: Plan, view: ModelView) -> None:
    """Refuse a folder that holds the artifact of another run.

    Text of the Hub's or the model's own is taken to be what it was; a file is read again.

    Raises:
        InputError: says what is different.
    """
    fingerprint = _fingerprint(planned, view)
    section = planned.recipe.calibration
    if section is not None and is_local(section.source) and section.source not in (AUTO, SELF):
        fingerprint["calibration"] = _text_fingerprint(_calibration(view, planned.recipe, None, _ignore))
    if changes := changed(finished.get("fingerprint", {}), fingerprint):
        fix = "choose another folder"
        raise InputError("--out", planned.out, f"holds another artifact: {'; '.join(changes)}", fix=fix)


def _source_of(kept: dict[str, Any] | None) -> str | None:
    """The calibration source that an interrupted run had settled on."""
    text = None if kept is None else kept["fingerprint"].get("calibration")
    return None if text is None else str(text["source"])


def _text_fingerprint(calibration: CalibrationSet | None) -> dict[str, str] | None:
    return None if calibration is None else {"source": calibration.source, "digest": calibration.digest}


def _make(job: Job) -> None:
    """Stages, artifact, reload check, publication."""
    for stage in active_stages(job.recipe):
        stage.run(job)
        release()
    job.emit(StageStarted("artifact"))
    started = time.perf_counter()
    if job.result is None:
        job.result = keep(job)
    recount(job)
    if job.plan is not None:
        job.plan = side_by_side(job.plan, *_output_groups(job.view.facts, job.result))
    job.report["artifact"] = write_artifact(job, job.result)
    release()
    job.report["reload_check"] = check = check_reload(
        job.folder.artifact, job.result, job.view.family, job.recipe.export.formats
    )
    job.emit(
        Message(
            f"reloaded {', '.join(check['formats'])}: every weight is what was computed, logits differ by "
            f"{max(found['relative_difference'] for found in check['formats'].values()):.1e} of the largest"
        )
    )
    job.report.update({"seconds": None, SO_FAR: round(job.folder.seconds(), 1)})
    from compress.report_page import write_report  # as in _finish

    write_report(job.folder.artifact, job.report, name=job.folder.out.name)
    job.folder.publish()
    job.emit(StageDone("artifact", time.perf_counter() - started))


def _output_groups(facts: ModelFacts, result: Result) -> tuple[dict[int, int], int]:
    """Columns of each packed o_proj that share a scale, by layer, and how many columns there are."""
    columns, found = facts.linears(0)["o"].in_features, {}
    for layer in range(facts.num_layers):
        scheme = result.schemes.get(facts.linears(layer)["o"].name)
        if scheme is not None:
            found[layer] = columns if scheme.group_size == -1 else scheme.group_size
    return found, columns


def _calibration(
    view: ModelView, recipe: Recipe, settled: str | None, emit: Callable[[Event], None]
) -> CalibrationSet | None:
    """The token windows; ``auto`` means what an interrupted run had settled on, Hub or not."""
    section = recipe.calibration
    if section is None:
        return None
    emit(StageStarted("calibration"))
    started = time.perf_counter()
    source = settled if settled is not None and section.source == AUTO else section.source
    request = Request(source, section.column, section.samples, section.seq_len, section.seed)
    fingerprint = json.dumps(view.checkpoint.fingerprint(), sort_keys=True)
    writer = Model(open=lambda: view.load_dense(fast_dtype()), fingerprint=fingerprint)
    found = prepare(request, view.tokenizer(), writer, progress=Every(10, emit))
    release()
    for note in found.notes:
        emit(Message(note))
    emit(StageDone("calibration", time.perf_counter() - started))
    return found


def _begin_report(planned: Plan, view: ModelView, calibration: CalibrationSet | None) -> dict[str, Any]:
    recipe = planned.recipe
    versions = {"compress": version("compress"), "python": platform.python_version()}
    versions |= {name: version(name) for name in LIBRARIES}
    return {
        "schema": SCHEMA,
        **_subject(view),
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.calibration.seed if recipe.calibration else 0,
        "command": shlex.join(["compress", *sys.argv[1:]])
        if Path(sys.argv[0]).name == "compress"
        else "compress.run()",
        "device": str(planned.device),
        "versions": versions,
        "calibration": None
        if calibration is None
        else {
            "source": calibration.source,
            "origin": calibration.origin,
            "notes": list(calibration.notes),
            "samples": calibration.ids.shape[0],
            "seq_len": calibration.ids.shape[1],
            "digest": calibration.digest,
            "hub_dataset": calibration.source.split(":")[0]
            if "of the Hugging Face Hub" in calibration.origin
            else None,
        },
        "fingerprint": _fingerprint(planned, view) | {"calibration": _text_fingerprint(calibration)},
    }


def _subject(view: ModelView) -> dict[str, Any]:
    """What is compressed: a model, or the packed weights of an artifact with what its report says of them."""
    if view.facts.packed:
        former = read_report(view.path) or {}
        kept = {"weights": former["weights"]} if "weights" in former else {}
        carried = {key: former["recipe"][key] for key in ("name", "description")} | {"command": former["command"]}
        return {"model": former["model"] | {"source": view.source}, "carried": carried} | kept
    facts = {
        "name": view.name(),
        "source": view.source,
        "family": view.family.name,
        "layers": view.num_layers,
        "parameters": view.facts.num_params,
    }
    return {"model": facts | origin_of(view).to_json()}


def _fingerprint(planned: Plan, view: ModelView) -> dict[str, Any]:
    """What decides the weights, as far as it is known before the calibration text is read."""
    return {
        "model": view.checkpoint.fingerprint(),
        "recipe": planned.recipe.model_dump(mode="json", include=DECIDING),
        "versions": {name: version(name) for name in ("compress", "torch", "transformers")},
        "device": planned.device.type,
        **plan_mark(view.path, planned.recipe),
    }


def summary(out: Path, report: dict[str, Any]) -> list[str]:
    """The end of a run in at most twelve lines."""
    artifact, weights = report["artifact"], report.get("weights", {})
    errors = sorted(m["relative_error"] for m in weights.get("modules", []) if m["relative_error"] is not None)
    lines = [
        f"{report['model']['name']} -> {out}",
        f"size     {artifact['weight_bytes'] / 1e6:.1f} MB, {artifact['bits_per_weight']:.2f} bits a weight "
        f"over the whole file ({artifact['bytes_16bit'] / artifact['weight_bytes']:.2f}x smaller than 16 bits)",
    ]
    if errors:
        lines.append(
            f"error    {errors[len(errors) // 2]:.4f} median, {errors[-1]:.4f} worst relative output error of a module"
        )
    if share := report.get("share"):
        lines.append(f"share    {share['summary']}")
    if heads := report.get("heads"):
        lines.append(f"heads    {heads['summary']}")
    if sparse := report.get("sparse"):
        lines.append(f"sparse   {sparse['summary']}")
    if kv := report.get("kv"):
        lines.append(f"cache    {kv['summary']}")
    if act := report.get("act"):
        lines.append(f"act      {act['summary']}")
    if weights.get("degraded"):
        lines.append(f"degraded {len(weights['degraded'])} modules were rounded to nearest: see report.json")
    room = min(4, 12 - len(lines) - 4)  # four more lines follow
    for row in (report.get("eval") or {}).get("rows", [])[:room]:
        lines.append(f"score    {row['task']} {row['metric']}: {_figure(row['before'])} -> {_figure(row['after'])}")
    reader = "compress.load" if artifact.get("shared_layers") else "transformers"
    lines.append(f"check    reloaded by {reader}, logits within {report['reload_check']['relative_difference']:.1e}")
    lines.append(f"time     {report['seconds']:.0f} s")
    lines.append(f"report   {out / 'report.html'}")
    lines.append(f"use      compress generate {shlex.quote(str(out))} --prompt 'Hello'")
    return lines


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _ignore(_: Event) -> None:
    pass

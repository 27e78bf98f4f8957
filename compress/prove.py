"""``compress prove``: finished artifacts measured beside their original, all on the same items, then laid side by side.

The original is scored once, however many artifacts there are. What is found goes into each artifact's report as soon as
it is there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from compress.bench import bench, is_original, original
from compress.calibrate.errors import InputError
from compress.comparison import named_reports
from compress.device import pick_device
from compress.eval_inputs import check_eval, prepare_eval
from compress.evalsuite.report import Comparison, compare_reports
from compress.evaluate import Candidate, eval_section, load_to, score_all, token_problem
from compress.events import Event, Message, StageDone, StageStarted
from compress.options import BenchOptions, EvalOptions
from compress.report_page import update_report
from compress.runtime import Unloaded, find
from compress.schema import Eval


def prove(
    artifacts: Sequence[Path],
    tasks: Sequence[str],
    options: EvalOptions | None = None,
    bench_options: BenchOptions | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Comparison:
    """Measure artifacts of one original.

    Args:
        artifacts: their folders.
        tasks: what to score, as for :func:`compress.evaluate.evaluate`; may be empty if efficiency is measured.
        options: how; ``baseline`` names the original where it isn't any more where the reports say.
        bench_options: how to measure size, memory and speed; None leaves that out.
        on_event: told what happens, see ``compress.events``.

    Returns:
        The artifacts side by side; their ``report.json``, ``report.html`` and model cards hold the same.

    Raises:
        InputError: before a model is loaded: no artifact, artifacts of different originals, an original that is gone,
            and all that :func:`compress.evaluate.evaluate` and :func:`compress.bench.bench` refuse.
    """
    options, emit = options or EvalOptions(), on_event or (lambda _: None)
    if not tasks and bench_options is None:
        raise InputError("--tasks", "none", "there is nothing to measure", fix="name a task, or use --bench")
    named = named_reports(artifacts)
    source = options.baseline or str(original(artifacts[0]).model)
    for folder, (_, report) in zip(artifacts, named, strict=True):
        if not is_original(report, source):
            raise InputError("ARTIFACT", folder, f"wasn't made of {source}", fix="name its original: --baseline MODEL")
    dense = find(source, trust_remote_code=options.trust_remote_code)
    models = {name: _artifact(folder, dense, options) for (name, _), folder in zip(named, artifacts, strict=True)}
    settings = _settings(options, tasks) if tasks else {}
    check_eval(options, tasks, dense.context)
    prepared = prepare_eval(options, tasks, dense.tokenizer)
    if bench_options is not None:
        for folder in artifacts:
            update_report(folder, efficiency=bench(folder, source, bench_options, emit))
    if tasks:
        emit(StageStarted("eval"))
        started = time.perf_counter()
        device = pick_device(options.device)
        outcomes = score_all(
            {name: Candidate(partial(load_to, found, device), found.cache) for name, found in models.items()},
            partial(load_to, dense, device),
            dense.tokenizer,
            prepared,
            told=lambda which, seconds: emit(Message(f"scored {which} in {seconds:.0f} s")),
        )
        for folder, outcome in zip(artifacts, outcomes, strict=True):
            update_report(folder, eval=eval_section(settings, outcome))
        emit(StageDone("eval", time.perf_counter() - started))
    return compare_reports(named_reports(artifacts))


def _artifact(folder: Path, dense: Unloaded, options: EvalOptions) -> Unloaded:
    found = find(folder, trust_remote_code=options.trust_remote_code)
    if problem := token_problem(found, dense, "the original"):
        raise InputError("ARTIFACT", folder, problem)
    return found


def _settings(options: EvalOptions, tasks: Sequence[str]) -> dict[str, Any]:
    """The options as the recipe's section of the same names."""
    values = {field.name: getattr(options, field.name) for field in fields(EvalOptions)}
    path = values.pop("task_path")
    kept = {name: value for name, value in values.items() if name in Eval.model_fields}
    kept["lengths"] = tuple(dict.fromkeys(options.lengths))
    section = Eval(**kept, tasks=tuple(tasks), task_path=None if path is None else str(path))
    return section.model_dump(mode="json")

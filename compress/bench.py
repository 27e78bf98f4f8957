"""``compress bench``: what a model costs to hold and to run, beside its baseline, measured in one go.

Each model lives in a process of its own, so that memory is that model's alone, and they take turns: model, baseline,
baseline, model in every round. What else the machine does slows both, and leaves the round's ratio nearly as it is.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.artifact.export import read_report
from compress.artifact.inspect import changed_files
from compress.bench_section import Measured, section
from compress.bench_side import (
    ADVICE,
    Facts,
    OpenSide,
    Settings,
    Subject,
    cache_bytes,
    facts,
    open_any_config,
    timed_turn,
)
from compress.calibrate.errors import InputError, did_you_mean
from compress.device import pick_device
from compress.evalsuite.efficiency import mean_pass
from compress.events import Event, Message, StageDone, StageStarted
from compress.model import open_config, open_model
from compress.options import BenchOptions
from compress.report_page import update_report
from compress.source import hub_config_folder, hub_report_folder, hub_weight_bytes, locate
from compress.worker import Owner, Turns, Worker

__all__ = ["DENSE", "Subject", "bench", "is_original", "original", "save"]

Emit = Callable[[Event], None]

DENSE = "dense"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROMPT_TOKENS = 512
_LENGTHS = (512, 2048)
_ROOM = 1.25  # the second model is taken to need what the first did while loading, and its answers a quarter more


def bench(
    model: str | Path | Subject,
    against: str | Path | Subject = DENSE,
    options: BenchOptions | None = None,
    on_event: Emit | None = None,
) -> dict[str, Any]:
    """Measure a model beside a baseline: ``compress bench`` in Python, without saving.

    A script calls it under ``if __name__ == "__main__"``, since processes are started as ``multiprocessing`` does.

    Args:
        model: an artifact or another model; a :class:`Subject` for a function that loads one, or for another cache.
        against: the baseline; ``"dense"`` is the original that the artifact's report names.
        options: how.
        on_event: told what happens, see ``compress.events``.

    Returns:
        The section ``efficiency`` of a report, see docs/report.md.

    Raises:
        InputError: no such model, device or type, a length beyond the context, an original that is gone, all before a
            model is loaded; a process that the system killed.
    """
    options = options or BenchOptions()
    emit = on_event or (lambda _: None)
    device = pick_device(options.device)
    subjects = _subjects(model, against)
    looks = {side: _look(subject, side) for side, subject in subjects.items()}
    settings = _settings(options, device, [context for _, context in looks.values() if context is not None])
    names = {side: name for side, (name, _) in looks.items()}
    emit(StageStarted("bench"))
    started = time.perf_counter()
    workers = {side: _worker(OpenSide(subject, settings), side, names[side]) for side, subject in subjects.items()}
    with Turns(workers, options.one_at_a_time) as turns:
        measured = _measure(turns, names, settings, options.rounds, emit)
    emit(StageDone("bench", time.perf_counter() - started))
    return section(measured, names, settings, options.rounds)


def save(artifact: str | Path, against: str | Path, efficiency: dict[str, Any]) -> Path | None:
    """Put the section into an artifact's ``report.json``, in the place of an older one, and into its page and card.

    The report compares with the original, so a comparison with another model has no place in it.

    Args:
        artifact: its folder.
        against: the baseline, as :func:`bench` was told: ``"dense"``, or where the same files lie now.
        efficiency: from :func:`bench`.

    Returns:
        ``report.json``; None if nothing was saved: this isn't an artifact, or the baseline isn't its original.
    """
    folder = Path(artifact).expanduser()
    report = read_report(folder)
    if report is None or not is_original(report, against):
        return None
    return update_report(folder, efficiency=efficiency)


def is_original(report: dict[str, Any], model: str | Path) -> bool:
    """Whether a model has the very files that an artifact was made of; ``"dense"`` has."""
    if model == DENSE:
        return True
    try:
        found = open_model(str(model)).checkpoint.fingerprint()
    except InputError:  # an artifact, or another model with packed weights
        return False
    return set(found.values()) == set(report["fingerprint"]["model"].values())


def _worker(make: OpenSide, side: str, name: str) -> Worker:
    return Worker(make, Owner(_option(side), name, f"most likely memory ran out: {ADVICE}"))


def _measure(turns: Turns, names: dict[str, str], settings: Settings, rounds: int, emit: Emit) -> Measured:
    found = Measured()
    for side in ("baseline", "model"):
        known: Facts = turns.ask(side, facts)
        found.facts[side] = known
        emit(Message(f"{side} {names[side]}: loaded in {known.seconds:.1f} s"))
        if side == "baseline" and not turns.alone and known.free < _ROOM * (known.load_peak or known.memory):
            turns.alone = True
            emit(Message("memory is short for two models, so each is loaded again for its turn"))
    for number in range(rounds):
        passes, peaks = found.begin_round()
        for side in ("model", "baseline", "baseline", "model"):
            done, peak = turns.ask(side, timed_turn, number)
            passes[side].append(done)
            peaks[side].append(peak)
        now = {side: mean_pass(passes[side]).first_token for side in passes}
        emit(
            Message(
                f"round {number + 1}/{rounds}: first token after {now['model']:.3g} s, baseline {now['baseline']:.3g} s"
            )
        )
    for side in ("model", "baseline") if settings.lengths else ():
        found.kv[side] = turns.ask(side, cache_bytes)
    return found


def _subjects(model: str | Path | Subject, against: str | Path | Subject) -> dict[str, Subject]:
    subject = model if isinstance(model, Subject) else Subject(model)
    if against == DENSE:
        if callable(subject.model):
            raise InputError("--against", DENSE, "a function has no original", fix="name the model to compare with")
        return {"baseline": original(subject.model), "model": subject}
    return {"baseline": against if isinstance(against, Subject) else Subject(against), "model": subject}


def original(artifact: str | Path) -> Subject:
    """The model that an artifact was made of, where its report says.

    Args:
        artifact: its folder, or its Hub id.

    Raises:
        InputError: not an artifact; the original is gone, or another one.
    """
    try:
        folder = _report_folder(str(artifact))
    except InputError as error:
        raise error.under("ARTIFACT") from error
    report = None if folder is None else read_report(folder)
    if report is None:
        fix = "give an artifact of `compress run`, or name the model to compare with: --against MODEL"
        raise InputError("ARTIFACT", artifact, "is not an artifact: it has no report.json that can be read", fix=fix)
    known = report["model"]
    source = known["source"]
    fix = "name it, or another model: --against MODEL"
    try:
        found = open_config(source)
    except InputError as error:
        problem = f"the original that the report of {artifact} names, {source}, can't be opened: {error.problem}"
        raise InputError("--against", DENSE, problem, fix=fix) from error
    if found.num_params != known["parameters"]:
        problem = f"{source} has {found.num_params:,} parameters, the original had {known['parameters']:,}"
        raise InputError("--against", DENSE, problem, fix=fix)
    return Subject(source, name=known["name"])


def _report_folder(artifact: str) -> Path | None:
    """Where the report of an artifact lies; of one on the Hub it is fetched, or None if there is none."""
    found = locate(artifact)
    if found.path is not None:
        return found.path
    online = hub_weight_bytes(artifact) is not None
    hub_config_folder(artifact, online)  # of a model that isn't there, the reason
    return hub_report_folder(artifact, online)


def _option(side: str) -> str:
    return "ARTIFACT" if side == "model" else "--against"


def _look(subject: Subject, side: str) -> tuple[str, int | None]:
    """Name and context of a model, from its config; the context of one that a function loads isn't known yet."""
    name, context = _callable_name(subject.model), None
    if not callable(subject.model):
        try:
            config, name = open_any_config(str(subject.model))
            _check_intact(str(subject.model))
        except InputError as error:
            raise error.under(_option(side)) from error
        context = getattr(config, "max_position_embeddings", None)
    own = "" if subject.cache is None else f" with {_callable_name(subject.cache)}"
    return subject.name or name + own, context


def _check_intact(model: str) -> None:
    """Raise for an artifact of this machine that was changed since it was written: before the other side is loaded."""
    folder = locate(model).path
    if folder is not None and folder.is_dir() and (changed := changed_files(folder.resolve())):
        raise InputError("--model", model, f"is damaged: {', '.join(changed)} changed since it was written")


def _callable_name(thing: Any) -> str:
    while isinstance(thing, partial):
        thing = thing.func
    return str(getattr(thing, "__name__", type(thing).__name__))


def _settings(options: BenchOptions, device: torch.device, contexts: list[int]) -> Settings:
    """Check the options, and choose what they leave open.

    Raises:
        InputError: names the option.
    """
    if options.rounds < 1:
        raise InputError("--rounds", options.rounds, "nothing would be measured", allowed="from 1")
    if options.new_tokens < 2:
        raise InputError("--new-tokens", options.new_tokens, "the first belongs to the prompt", allowed="from 2")
    if options.prompt_tokens is not None and options.prompt_tokens < 1:
        raise InputError("--prompt-tokens", options.prompt_tokens, "a prompt has at least 1", allowed="from 1")
    if options.lengths and min(options.lengths) < 2:
        raise InputError("--lengths", min(options.lengths), "is too short to decode", allowed="from 2")
    if options.threads < 1:
        raise InputError("--threads", options.threads, "nothing would be computed", allowed="from 1")
    dtype = options.dtype
    if dtype == "auto":
        half = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float16"
        dtype = "float32" if device.type == "cpu" else half
    if dtype not in DTYPES:
        near = did_you_mean(dtype, DTYPES)
        raise InputError("--dtype", dtype, "there is no such type", allowed=f"auto, {', '.join(DTYPES)}", fix=near)
    context = min(contexts, default=None)
    prompt, lengths = options.prompt_tokens, options.lengths
    if prompt is None:
        prompt = _PROMPT_TOKENS if context is None else max(1, min(_PROMPT_TOKENS, context - options.new_tokens))
    if lengths is None:
        lengths = tuple(n for n in _LENGTHS if context is None or n <= context) or (context or 2,)
    settings = Settings(
        prompt_tokens=prompt,
        new_tokens=options.new_tokens,
        lengths=tuple(sorted(set(lengths))),
        device=str(device),
        dtype=DTYPES[dtype],
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        activations=options.activations,
        packed_threads=options.threads,
    )
    settings.check(context)
    return settings

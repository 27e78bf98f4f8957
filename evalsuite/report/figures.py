"""All figures of a report as one flat list, each with the conditions under which it may be compared with another's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from compress.evalsuite.report import glossary
from compress.evalsuite.report.blocks import Tone
from compress.evalsuite.report.conditions import (
    base_model,
    error_conditions,
    model_name,
    needle_facts,
    score_conditions,
    text_facts,
    texts,
)
from compress.evalsuite.report.costs import outcome
from compress.evalsuite.report.findings import Finding, findings
from compress.evalsuite.report.layers import modules, percent_short
from compress.evalsuite.report.needles import fields, mean_by_length, tokens
from compress.evalsuite.report.wording import (
    change,
    dig,
    is_number,
    nbytes,
    number,
    percent,
    quantity,
    times,
)

SECTIONS = ("size", "scores", "agreement", "long_context", "speed", "kv", "errors")
"""The sections of a comparison, in the order in which they are read."""


@dataclass(frozen=True)
class Figure:
    """One figure of one artifact; see ``comparison.Row`` and ``comparison.Entry``.

    Attributes:
        section: one of ``SECTIONS``.
        key: unique in its section.
        label: what the figure is.
        value: the figure.
        text: the same with its unit.
        about: more on it.
        original: the original's figure.
        original_text: the same with its unit.
        change: against the original, in words.
        tone: whether that is good.
        higher_is_better: which way is up.
        conditions: what must be equal for figures to be comparable, by name.
    """

    section: str
    key: str
    label: str
    value: float | None
    text: str
    about: str = ""
    original: float | None = None
    original_text: str = ""
    change: str = ""
    tone: Tone = ""
    higher_is_better: bool | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Every figure of a report, section by section."""
    sources = (_sizes, _scores, _agreement, _long_context, _speed, _cache, _errors)
    return [figure for source in sources for figure in source(report)]


def _sizes(report: Mapping[str, Any]) -> Iterator[Figure]:
    artifact = report.get("artifact") or {}
    weight, whole, bits = artifact.get("weight_bytes"), artifact.get("bytes_16bit"), artifact.get("bits_per_weight")
    model = {"original": model_name(report)}
    if is_number(weight):
        ratio = whole / weight if is_number(whole) and weight else 0.0
        yield Figure(
            section="size",
            key="weight_bytes",
            label="Weights on disk",
            value=weight,
            text=nbytes(weight),
            original=whole,
            original_text=f"{nbytes(whole)} at 16 bits" if is_number(whole) else "",
            change=f"{times(ratio)} smaller" if ratio >= 1 else "",
            tone="good" if ratio >= 1 else "",
            higher_is_better=False,
            conditions=model,
        )
    if is_number(bits):
        yield Figure(
            section="size",
            key="bits_per_weight",
            label="Bits per weight",
            value=bits,
            text=f"{bits:.2f}",
            about="over the whole file",
            original=16.0,
            original_text="16",
            higher_is_better=False,
            conditions=model,
        )


def _scores(report: Mapping[str, Any]) -> Iterator[Figure]:
    for one in findings(report):
        known = glossary.task(one.task)
        tested = f", p {'<' if one.p < 0.05 else '≥'} 0.05" if one.p is not None else ""
        yield Figure(
            section="scores",
            key=score_key(one),
            label=f"{known.title}, {one.metric_words()}",
            value=one.after,
            text=one.figure(one.after, one.after_stderr),
            about=known.about,
            original=one.before,
            original_text=one.figure(one.before, one.before_stderr),
            change=one.change() + tested if one.before != one.after else "unchanged",
            tone=one.tone,
            higher_is_better=one.higher_is_better,
            conditions=score_conditions(report, one),
        )


def score_key(one: Finding) -> str:
    """The key of a score's row."""
    return f"{one.task}/{one.metric}"


def _agreement(report: Mapping[str, Any]) -> Iterator[Figure]:
    found = dig(report, "eval", "divergence") or {}
    greedy = found.get("greedy") or {}
    base = texts({**base_model(report), **text_facts(report), "text": found.get("text"), "tokens": found.get("tokens")})
    asked = base | texts({"prompts": greedy.get("prompts"), "tokens written": greedy.get("tokens")})
    entries = (
        ("top1_agreement", "Same next token", found.get("top1_agreement"), True, base),
        ("mean_kl", "KL divergence, nats per token", found.get("mean_kl"), False, base),
        ("changed_answers", "Answers changed", greedy.get("changed_answers"), False, asked),
    )
    for key, label, value, up, conditions in entries:
        if is_number(value):
            text = number(value, 3) if key == "mean_kl" else percent(value)
            yield Figure(
                "agreement",
                key,
                f"{label} {'↑' if up else '↓'}",
                value,
                text,
                higher_is_better=up,
                conditions=conditions,
            )


def _long_context(report: Mapping[str, Any]) -> Iterator[Figure]:
    found = dig(report, "eval", "long_context") or {}
    before, after = fields(found.get("before")), fields(found.get("after"))
    conditions = texts(base_model(report) | needle_facts(report))
    for task in dict.fromkeys(task for task, _, _ in after):
        original = mean_by_length(before, task)
        for length, score in mean_by_length(after, task).items():
            first = original.get(length)
            moved = 100 * (score - first) if first is not None else 0.0
            yield Figure(
                section="long_context",
                key=f"{task}/{length}",
                label=f"{glossary.task(task).title}, {tokens(length)} tokens ↑",
                value=score,
                text=percent(score, 0),
                about=glossary.task(task).about,
                original=first,
                original_text="" if first is None else percent(first, 0),
                change=change(moved, 0, "points") if moved else "",
                higher_is_better=True,
                conditions=conditions,
            )


def _speed(report: Mapping[str, Any]) -> Iterator[Figure]:
    found = report.get("efficiency") or {}
    keys = ("device", "threads", "dtype", "prompt_tokens", "new_tokens")
    timed = texts(base_model(report) | {key.replace("_", " "): found.get(key) for key in keys})
    for row in found.get("rows") or []:
        if not is_number(row.get("ratio")):
            continue
        label, about = glossary.efficiency(str(row["metric"]))
        tone, _ = outcome(row)
        unit, up = str(row.get("unit") or ""), row.get("higher_is_better")
        arrow = {True: " ↑", False: " ↓", None: ""}[up]
        # a ratio is compared: both sides of it were measured in turn, the machine's mood cancels out
        yield Figure(
            section="speed",
            key=str(row["metric"]),
            label=label + arrow,
            value=row["ratio"],
            text=times(row["ratio"]),
            about=about,
            original=1.0,
            original_text="1×",
            change=f"{quantity(row.get('baseline'), unit)} → {quantity(row.get('model'), unit)}",
            tone=tone,
            higher_is_better=up,
            conditions=base_model(report) if str(row["metric"]).startswith("weight_bytes") else timed,
        )


def _cache(report: Mapping[str, Any]) -> Iterator[Figure]:
    for entry in dig(report, "efficiency", "kv") or []:
        if not is_number(entry.get("model_bytes")):
            continue
        base = entry.get("baseline_bytes")
        ratio = entry.get("ratio")
        yield Figure(
            section="kv",
            key=str(entry["length"]),
            label=f"KV cache, {entry['length']:,} tokens ↓",
            value=entry["model_bytes"],
            text=nbytes(entry["model_bytes"]),
            original=base,
            original_text=nbytes(base),
            change=times(ratio) if is_number(ratio) and abs(ratio - 1) > 0.005 else "unchanged",
            tone="good" if is_number(ratio) and ratio < 0.995 else "bad" if is_number(ratio) and ratio > 1.005 else "",
            higher_is_better=False,
            conditions=texts(base_model(report) | {"dtype": dig(report, "efficiency", "dtype")}),
        )


def _errors(report: Mapping[str, Any]) -> Iterator[Figure]:
    known = [module for module in modules(report) if module.error is not None]
    if not known:
        return
    values = [module.error or 0.0 for module in known]
    worst = max(known, key=lambda module: module.error or 0.0)
    entries = (
        ("median", median(values), "half of the modules have less", ""),
        ("worst", worst.error, "the module that lost most", worst.label),
    )
    for key, value, about, where in entries:
        yield Figure(
            section="errors",
            key=key,
            label=f"Relative error, {key} ↓",
            value=value,
            text=percent_short(value),
            about=about,
            change=where,
            higher_is_better=False,
            conditions=error_conditions(report),
        )

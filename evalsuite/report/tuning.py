"""The section on end-to-end tuning: what scales and norms learnt from the original's answers, and whether it held."""

from collections.abc import Mapping
from typing import Any

from compress.evalsuite.report import draw
from compress.evalsuite.report.blocks import Block, Chart, Facts, Note, Section, Table, Tone
from compress.evalsuite.report.wording import dig, is_number, number, plural, seconds, signed_text


def tuning(report: Mapping[str, Any]) -> Section | None:
    """What was tuned and what it brought; None if nothing was."""
    found = dig(report, "weights", "tuning")
    if not found:
        return None
    blocks: list[Block] = [Note(*_outcome(found)), Facts(_facts(found))]
    known = [(epoch, kl) for epoch, kl in enumerate(found.get("kl_by_epoch") or [], 1) if is_number(kl)]
    if len(known) > 1:
        epochs, values = zip(*known, strict=True)
        titles = tuple(f"pass {epoch}: {number(kl)}" for epoch, kl in known)
        line = draw.Line(tuple(map(float, epochs)), values, 0, "series-0", titles)
        blocks.append(
            Chart(
                "tuning",
                "Distance from the original on the text that was learnt from, pass by pass",
                lambda width: draw.lines(width, [line], ("pass", _plain), ("KL divergence", _plain)),
            )
        )
    if known:
        rows = tuple((str(epoch), number(kl)) for epoch, kl in known)
        blocks.append(
            Table("KL divergence while learning, mean of a pass", ("Pass", "Nats per token"), rows, frozenset({1}))
        )
    return Section(
        "tuning",
        "What was learnt after rounding",
        "Tuning",
        "After rounding, scales and norms learnt to answer as the original does. The measure is the KL divergence from"
        " it, in nats per token; lower is better, and only text that was held out proves a gain.",
        tuple(blocks),
    )


def tuning_clause(report: Mapping[str, Any]) -> str | None:
    """What was tuned and what it brought, as a clause; None if nothing was."""
    found = dig(report, "weights", "tuning")
    if not found:
        return None
    outcome, _ = _outcome(found)
    passes = plural(found["epochs"], "pass", "passes")
    text = f"scales and norms tuned end to end on the original's answers, {passes} over the calibration text"
    return f"{text}. {outcome}".rstrip(".")


def _outcome(found: Mapping[str, Any]) -> tuple[str, Tone]:
    """In a sentence, and whether that is good."""
    held = found.get("held_out")
    if not held:
        return "There was no second window of text to hold out, so the gain isn't known.", ""
    before, after = number(held["kl_before"]), number(held["kl_after"])
    if found["kept"]:
        return f"On held-out text the KL divergence fell from {before} to {after} nats per token.", "good"
    return (
        f"On held-out text the KL divergence didn't fall ({before} before, {after} after), so nothing that was learnt"
        " was kept.",
        "bad",
    )


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    entries = {
        "Passes over the text": f"{found['epochs']}, {plural(found['steps'], 'step')} in all",
        "Learning rate": signed_text(f"{found['learning_rate']:g}"),
        "Time": seconds(found.get("seconds")),
    }
    if held := found.get("held_out"):
        entries["Held out"] = plural(held["windows"], "window")
    return entries


def _plain(value: float) -> str:
    return f"{value:g}"

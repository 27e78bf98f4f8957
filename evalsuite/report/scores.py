"""The sections on quality: scores before and after, and how often both models say the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report import draw, glossary
from compress.evalsuite.report.blocks import Block, Cell, Chart, Key, Note, Section, Table
from compress.evalsuite.report.findings import Finding, findings
from compress.evalsuite.report.svg import Drawing
from compress.evalsuite.report.wording import (
    CLEAR,
    dig,
    is_number,
    listed,
    number,
    percent,
    plural,
    signed_text,
)

SINK_ALARM = 5.0
"""Points by which the share of heads that rest on the first token may fall."""

CLEARLY_NOTE = (
    "How to read it: ± is the standard error, how far the figure would wander with other questions. The p-value comes"
    " from a paired test on the same items: it is the chance of a difference this large if compression changed nothing."
    f" Below {CLEAR:g} the page calls a difference clear."
)


def scores(report: Mapping[str, Any]) -> Section | None:
    """Scores before and after; None if nothing was scored."""
    found = findings(report)
    if not found:
        return None
    blocks: list[Block] = []
    drawn = [one for one in found if one.gain is not None]
    if len(drawn) > 1:
        blocks.append(
            Chart(
                "scores",
                "Change of every score against the original, in per cent of the original's figure",
                lambda width: _chart(width, drawn, found),
                (
                    Key("good", "clearly better", "●"),
                    Key("bad", "clearly worse", "●"),
                    Key("neutral", "no clear difference", "●"),
                ),
                reading="Left of the line the compressed model is worse, right of it better; a bar that crosses"
                " the line may be"
                " chance (95 % interval).",
            )
        )
    blocks.append(_table(found))
    blocks.append(Note(CLEARLY_NOTE, "muted"))
    blocks += [Note(text) for text in _conditions(report, found)]
    return Section(
        "scores",
        "What it cost: scores before and after",
        "Scores",
        "The original and the compressed model answered the same items; ↑ means that higher is better, ↓ that"
        " lower is.",
        tuple(blocks),
    )


def label(one: Finding, among: Sequence[Finding]) -> str:
    """The task, with its metric where the table has several of them."""
    several = sum(other.task == one.task for other in among) > 1
    return f"{one.title()}, {one.metric.split(',')[0]}" if several else one.title()


def describe(one: Finding) -> Cell:
    """The row header of a finding: task, what it asks, metric, number of items."""
    known = glossary.task(one.task)
    parts = [known.about, one.metric_words()]
    if one.n:
        parts.append(f"{one.n:,} {'tokens' if one.task == 'perplexity' else 'items'}")
    if known.guess is not None and one.share:
        parts.append(f"guessing gives {percent(known.guess, 0)}")
    return Cell(known.title, " · ".join(part for part in parts if part))


def _table(found: Sequence[Finding]) -> Table:
    rows = [
        (
            describe(one),
            one.figure(one.before, one.before_stderr),
            one.figure(one.after, one.after_stderr),
            Cell(one.change(), tone=one.tone),
            one.verdict(),
        )
        for one in found
    ]
    head = ("Task", "Original", "Compressed", "Change", "Meaning")
    return Table(
        "Scores of the original and of the compressed model", head, tuple(rows), frozenset({1, 2, 3}), stacked=True
    )


def _chart(width: int, drawn: Sequence[Finding], among: Sequence[Finding]) -> Drawing:
    rows = []
    for one in drawn:
        assert one.gain is not None
        ends = one.gain_range()
        low, high = (None, None) if ends is None else (100 * ends[0], 100 * ends[1])
        colour = {"good": "good", "bad": "bad"}.get(one.tone, "neutral")
        title = f"{label(one, among)}: {one.change()}. {one.verdict()}"
        rows.append((label(one, among), [draw.Interval(100 * one.gain, low, high, colour, title=title)]))
    return draw.intervals(
        width,
        rows,
        0.0,
        ("worse  ←  change in %  →  better", lambda value: signed_text(f"{value:+g}" if value else "0")),
    )


def _conditions(report: Mapping[str, Any], found: Sequence[Finding]) -> list[str]:
    """What else a reader must know about the figures."""
    notes = []
    if text := dig(report, "eval", "note"):
        notes.append(str(text))
    limit = dig(report, "eval", "settings", "limit")
    if limit and any(one.task != "perplexity" for one in found):
        notes.append(
            f"Only the first {plural(limit, 'item')} of every task were used, so the scores aren't comparable"
            " with published ones."
        )
    shots = dig(report, "eval", "settings", "num_fewshot")
    if shots is not None:
        notes.append(f"{plural(shots, 'example')} before every question.")
    tested = [one for one in found if one.p is not None]
    if len(tested) >= 5:
        notes.append(f"With {len(tested)} tests, one in twenty looks clear by chance alone.")
    near = [
        one.title()
        for one in found
        if (guess := glossary.task(one.task).guess) is not None
        and one.share and one.before is not None and one.before - guess < 3 * (one.before_stderr or 0.0)
    ]  # fmt: skip
    if near:
        names = listed(list(dict.fromkeys(near)))
        notes.append(
            f"The original itself is hardly better than guessing on {names}: an unchanged score there says little."
        )
    return notes


def divergence(report: Mapping[str, Any]) -> Section | None:
    """How often both models say the same; None if that wasn't measured."""
    found = dig(report, "eval", "divergence")
    if not found:
        return None
    rows: list[tuple[str | Cell, ...]] = []
    if is_number(found.get("top1_agreement")):
        about = "how often both think the same token comes next · 100 % is best"
        rows.append((Cell("Same next token", about), percent(found["top1_agreement"])))
    if is_number(found.get("mean_kl")):
        error = f" ± {number(found['kl_stderr'], 3)}" if is_number(found.get("kl_stderr")) else ""
        about = "how far apart their predictions are (KL divergence, nats per token) · 0 is best"
        rows.append((Cell("Distance of predictions", about), number(found["mean_kl"], 3) + error))
    greedy = found.get("greedy") or {}
    if is_number(greedy.get("changed_answers")):
        about = "answers that differ anywhere when each model writes on by itself · 0 % is best"
        of = f"{plural(greedy['prompts'], 'prompt')}, {greedy['tokens']:,} tokens each" if _counted(greedy) else ""
        rows.append((Cell("Answers changed", about), Cell(percent(greedy["changed_answers"]), of)))
    if is_number(greedy.get("changed_tokens")):
        about = "tokens that differ in those answers; one early change alters all that follow"
        rows.append((Cell("Tokens of answers changed", about), percent(greedy["changed_tokens"])))
    rows += _sinks(dig(report, "eval", "sinks") or {})
    blocks: list[Block] = [
        Table("Agreement of the compressed model with the original", ("Measure", "Value"), tuple(rows), frozenset({1}))
    ]
    if found.get("tokens") and found.get("text"):
        blocks.append(Note(f"Measured on {found['tokens']:,} tokens of {found['text']}."))
    return Section(
        "divergence",
        "Does it still say the same?",
        "Agreement",
        "Both models read the same text and their next tokens are compared; the more they agree, the better."
        " Scores can stay"
        " equal while answers change.",
        tuple(blocks),
    )


def _sinks(found: Mapping[str, Any]) -> list[tuple[str | Cell, ...]]:
    """The row of the heads that rest on the first token, if they were counted."""
    known = ("before", "after", "sequences", "tokens", "threshold")
    if not all(is_number(found.get(key)) for key in known):
        return []
    about = (
        f"query heads that give the first token more than {percent(found['threshold'], 0)} of their attention · a fall"
        f" by {SINK_ALARM:g} points is a bad sign"
    )
    before, after = found["before"], found["after"]
    of = f"{plural(found['sequences'], 'piece')} of text, {found['tokens']:,} tokens each"
    value = Cell(f"{percent(before / 100)} → {percent(after / 100)}", of, "bad" if before - after >= SINK_ALARM else "")
    return [(Cell("Heads that rest on the first token", about), value)]


def _counted(greedy: Mapping[str, Any]) -> bool:
    return is_number(greedy.get("prompts")) and is_number(greedy.get("tokens"))

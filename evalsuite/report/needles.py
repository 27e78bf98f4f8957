"""The section on long texts: scores by length and depth, of the original and of the compressed model."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from compress.evalsuite.report import draw, glossary
from compress.evalsuite.report.blocks import Block, Chart, Charts, Note, Scale, Section, Table
from compress.evalsuite.report.svg import RAMP
from compress.evalsuite.report.wording import MISSING, change, dig, is_number, listed, percent, plural

FAILS = 0.5
"""Below this mean score the original is said to fail by itself."""

SCALE = Scale("cool", "0 %", "100 %")

Entry = Mapping[str, Any]
Fields = dict[tuple[str, int, float | None], float]


def long_context(report: Mapping[str, Any]) -> Section | None:
    """Long-context scores; None if they weren't measured."""
    found = dig(report, "eval", "long_context")
    before, after = fields(dig(found, "before")), fields(dig(found, "after"))
    if not before and not after:
        return None
    blocks: list[Block] = [Note(text) for text in _ceiling(before, after)]
    tasks = list(dict.fromkeys(task for task, _, _ in after or before))
    if len(tasks) > 1 or not _depths(tasks[0], after or before):
        blocks.append(overview(_panels(before, after), tasks))
    grids = tuple(_by_depth(task, before, after) for task in tasks if _depths(task, after or before))
    if grids:
        blocks.append(Charts(grids, SCALE, "Depth 0 % is the beginning of the text, 100 % its end."))
    blocks.append(_table(found, before, after))
    blocks += [Note(text) for text in _conditions(found)]
    return Section(
        "needles",
        "Finding a fact in a long text",
        "Long texts",
        "A fact is hidden at some depth of a long text and asked for at the end; 100 % is best. What the"
        " original can't do"
        " is its own limit, not a loss.",
        tuple(blocks),
    )


def fields(entries: Sequence[Entry] | None) -> Fields:
    """Scores by task, length and depth; depth is None for a task without one place."""
    return {
        (str(entry["task"]), int(entry["length"]), entry.get("depth")): float(entry["score"])
        for entry in entries or []
        if is_number(entry.get("score"))
    }


def mean_by_length(scores: Fields, task: str | None = None) -> dict[int, float]:
    """The mean score at every length, of one task or of all."""
    chosen = {key: score for key, score in scores.items() if task is None or key[0] == task}
    return {
        length: fmean(score for key, score in chosen.items() if key[1] == length)
        for length in sorted({key[1] for key in chosen})
    }


def _cell(score: float | None, title: str) -> draw.Cell:
    """A field of a heat map, from 0 to 100 %."""
    if score is None:
        return draw.Cell("missing", "", title)
    return draw.Cell(f"cool-{min(RAMP - 1, int(score * RAMP))}", f"{100 * score:.0f}", f"{title}: {percent(score, 0)}")


def tokens(length: int) -> str:
    """A length as its users call it: 2048 is ``2k``, 2000 too."""
    if length >= 1000 and length % 1024 == 0:
        return f"{length // 1024}k"
    return f"{length / 1000:g}k" if length >= 1000 and length % 100 == 0 else f"{length:,}"


def _ceiling(before: Fields, after: Fields) -> list[str]:
    """What the original can do, and what the compressed model kept of it."""
    both = before.keys() & after.keys()
    if not both:
        return []
    ceiling, kept = fmean(before[key] for key in both), fmean(after[key] for key in both)
    text = f"Over all lengths and depths the original scores {percent(ceiling)}, the compressed model {percent(kept)}"
    difference = kept - ceiling
    text += "." if difference == 0 else f" ({change(100 * difference, 1, 'points')})."
    notes = [text]
    per_task = {
        task: fmean(before[key] for key in both if key[0] == task) for task in dict.fromkeys(key[0] for key in both)
    }
    failing = sorted(glossary.task(task).title for task, score in per_task.items() if score < FAILS)
    if failing:
        notes.append(
            f"The original itself gets less than half of {listed(failing)} right: that is"
            " this model's own ceiling, not a loss by compression."
        )
    return notes


def _depths(task: str, scores: Fields) -> list[float]:
    return sorted({depth for name, _, depth in scores if name == task and depth is not None})


def overview(sources: Sequence[tuple[str, Fields]], tasks: Sequence[str]) -> Chart:
    """A heat map of mean scores by task and length for each model, named by its title."""
    lengths = sorted({length for _, scores in sources for task, length, _ in scores if task in tasks})
    panels = []
    for title, scores in sources:
        cells = {}
        for row, task in enumerate(tasks):
            means = mean_by_length(scores, task)
            for column, length in enumerate(lengths):
                name = f"{title}, {glossary.task(task).title}, {tokens(length)} tokens"
                cells[row, column] = _cell(means.get(length), name)
        panels.append((title, cells))
    rows = [glossary.task(task).title for task in tasks]
    names = ("", "length in tokens")
    return Chart(
        "long-context",
        "Score of every task by length of the text, in per cent",
        lambda width: draw.grids(width, panels, rows, [tokens(length) for length in lengths], names),
        scale=SCALE,
    )


def _by_depth(task: str, before: Fields, after: Fields) -> Chart:
    depths = _depths(task, before | after)
    lengths = sorted({length for name, length, _ in before | after if name == task})
    title = glossary.task(task).title
    panels = []
    for panel, scores in _panels(before, after):
        cells = {
            (row, column): _cell(
                scores.get((task, length, depth)),
                f"{title}, {tokens(length)} tokens, depth {percent(depth, 0)}, {panel.lower()}",
            )
            for row, depth in enumerate(depths)
            for column, length in enumerate(lengths)
        }
        panels.append((panel, cells))
    rows = [percent(depth, 0) for depth in depths]
    about = glossary.task(task).about
    return Chart(
        f"needle-{task}",
        f"{title}: {about}" if about else title,
        lambda width: draw.grids(
            width, panels, rows, [tokens(length) for length in lengths], ("depth", "length in tokens")
        ),
    )


def _panels(before: Fields, after: Fields) -> list[tuple[str, Fields]]:
    return [(title, scores) for title, scores in (("Original", before), ("Compressed", after)) if scores]


def _table(found: Mapping[str, Any], before: Fields, after: Fields) -> Table:
    counts = {
        (str(entry["task"]), int(entry["length"]), entry.get("depth")): entry.get("n")
        for entry in [*(found.get("before") or []), *(found.get("after") or [])]
    }
    rows = []
    for key in sorted(
        before.keys() | after.keys(), key=lambda key: (key[0], key[1], key[2] if key[2] is not None else -1)
    ):
        task, length, depth = key
        rows.append(
            (
                glossary.task(task).title,
                f"{length:,}",
                MISSING if depth is None else percent(depth, 0),
                percent(before.get(key), 0),
                percent(after.get(key), 0),
                str(counts.get(key) or MISSING),
            )
        )
    head = ("Task", "Length", "Depth", "Original", "Compressed", "Tests")
    return Table("Every score by task, length and depth", head, tuple(rows), frozenset(range(1, 6)), folded=True)


def _conditions(found: Mapping[str, Any]) -> list[str]:
    counts = {entry.get("n") for entry in found.get("after") or []} - {None}
    notes = []
    if counts and max(counts) < 10:
        most = plural(max(counts), "test")
        notes.append(f"Every field stands for at most {most}, so single fields say little; look at rows and columns.")
    parts = []
    if found.get("haystack"):
        parts.append(f"The text around the fact: {found['haystack']}.")
    if found.get("seed") is not None:
        parts.append(f"Seed {found['seed']}.")
    return [*notes, " ".join(parts)] if parts else notes

"""The page of several artifacts: tiles for each, one table a section, charts with one series an artifact."""

from collections.abc import Iterable, Sequence

from compress.evalsuite.report import draw, glossary
from compress.evalsuite.report.blocks import Block, Cell, Chart, Facts, Key, Note, Page, Section, Source, Table
from compress.evalsuite.report.comparison import Comparison, Entry, Row
from compress.evalsuite.report.costs import notes, ratio_interval, ratio_text
from compress.evalsuite.report.figures import score_key
from compress.evalsuite.report.findings import findings
from compress.evalsuite.report.layers import mean_errors, percent_short
from compress.evalsuite.report.needles import fields, overview, tokens
from compress.evalsuite.report.origin import HASHES, facts_of
from compress.evalsuite.report.summary import summary
from compress.evalsuite.report.svg import SERIES
from compress.evalsuite.report.wording import MISSING, dig, listed, nbytes, plural, shortened, signed_text

NAME = 34
"""Characters of an artifact's name in a legend."""


def page(comparison: Comparison) -> Page:
    """The page of a comparison."""
    makers = (_sizes, _scores, _agreement, _long_context, _speed, _cache, _errors, _origin)
    sections = [section for make in makers if (section := make(comparison)) is not None]
    return Page(
        title=" · ".join(shortened(name, 40) for name in comparison.names)
        if len(comparison.names) <= 3
        else f"{len(comparison.names)} compressed models",
        kicker="Compressed models side by side",
        verdict=_verdict(comparison),
        summaries=tuple(
            summary(report, name) for name, report in zip(comparison.names, comparison.reports, strict=True)
        ),
        sections=tuple(sections),
        foot="Made by compress from the artifacts' own reports (report.json in each folder).",
    )


def _verdict(comparison: Comparison) -> tuple[Note, ...]:
    models = comparison.models
    count = plural(len(comparison.names), "artifact")
    if len(models) == 1:
        notes = [Note(f"{count}, all made from {models[0]}. The column “original” is that model, uncompressed.")]
    else:
        text = f"{count}, made from different models ({listed(models)}): what was lost isn't comparable between them."
        notes = [Note(text, "bad")]
    marked = sum(bool(entry and entry.differs) for row in comparison.rows for entry in row.entries)
    if marked:
        text = (
            f"{plural(marked, 'figure')} can't be compared, because they were measured differently from the"
            " first artifact's:"
            " the tables say how, and no chart shows them."
        )
        notes.append(Note(text, "bad"))
    return tuple(notes)


def _sizes(comparison: Comparison) -> Section | None:
    """Size on disk, and where it can be, against the best measure of quality that is comparable."""
    rows = comparison.of("size")
    sizes = next((row for row in rows if row.key == "weight_bytes"), None)
    if sizes is None:
        return None
    quality = next((row for row in comparison.of("agreement") if row.key == "top1_agreement"), None) or next(
        (row for row in comparison.of("scores") if row.key.startswith("perplexity/")), None
    )
    blocks: list[Block] = []
    points = [] if quality is None else _points(comparison, sizes, quality)
    if quality is not None and len(points) > 1:
        unit = " in %" if quality.section == "agreement" else ""
        better = "upper" if quality.higher_is_better else "lower"
        blocks.append(
            Chart(
                "tradeoff",
                f"{quality.label.rstrip(' ↑↓')} against size on disk",
                lambda width: draw.points(width, points, ("MB on disk", _plain), (f"{quality.label}{unit}", _plain)),
                reading=f"The best place is the {better} left: small, and near to the original.",
            )
        )
        rows = [*rows, quality]
    bars = [draw.Bar("original, 16 bits", sizes.original, nbytes(sizes.original), "muted")] if sizes.original else []
    bars += [
        draw.Bar(shortened(name, 24), entry.value, entry.text, _colour(index), f"{name}: {entry.text}")
        for index, (name, entry) in enumerate(zip(comparison.names, sizes.entries, strict=True))
        if entry is not None and entry.value is not None
    ]
    blocks.append(Chart("size", "Bytes of the weights on disk", lambda width: draw.bars(width, bars)))
    blocks.append(_table("Size on disk", comparison.names, rows))
    lead = "How large the weights are as files; smaller is better, but usually costs quality."
    return Section("size", "Size", "Size", lead, tuple(blocks))


def _points(comparison: Comparison, sizes: Row, quality: Row) -> list[draw.Line]:
    """Size in MB and quality of the artifacts that can be compared; shares as per cent."""
    scale = 100.0 if quality.section == "agreement" else 1.0
    found = []
    for index, name in enumerate(comparison.names):
        size, other = sizes.entries[index], quality.entries[index]
        if size is None or other is None or other.differs or size.value is None or other.value is None:
            continue
        title = f"{name}: {size.text}, {other.text}"
        place = (size.value / 1e6,), (other.value * scale,)
        found.append(draw.Line(*place, index, _colour(index), (title,), shortened(name, 22)))
    return found


def _scores(comparison: Comparison) -> Section | None:
    rows = comparison.of("scores")
    if not rows:
        return None
    drawn = _score_intervals(comparison, rows)
    blocks: list[Block] = []
    if drawn:
        blocks.append(
            Chart(
                "scores",
                "Change of every score against the original, in per cent of the original's figure",
                lambda width: draw.intervals(width, drawn, 0.0, ("worse  ←  change in %  →  better", _signed)),
                _keys(comparison.names, [item.series for _, items in drawn for item in items]),
                reading="Left of the line a model is worse than the original, right of it better; the bars are"
                " 95 % intervals.",
            )
        )
    blocks.append(_table("Scores of the original and of every artifact", comparison.names, rows))
    blocks.append(
        Note(
            "p < 0.05 means that chance hardly explains the difference from the original (paired test on the"
            " same items).",
            "muted",
        )
    )
    lead = "Every model answered the same items as the original; ↑ means that higher is better, ↓ that lower is."
    return Section("scores", "Scores", "Scores", lead, tuple(blocks))


def _score_intervals(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, list[draw.Interval]]]:
    """One row a score, with an interval for every artifact where it can be compared."""
    found = [{score_key(one): one for one in findings(report)} for report in comparison.reports]
    drawn = []
    for row in rows:
        items = []
        for index, name in enumerate(comparison.names):
            one = found[index].get(row.key)
            if one is None or one.gain is None or not row.comparable(index):
                continue
            ends = one.gain_range()
            low, high = (None, None) if ends is None else (100 * ends[0], 100 * ends[1])
            title = f"{name}, {row.label}: {one.change()}. {one.verdict()}"
            items.append(draw.Interval(100 * one.gain, low, high, _colour(index), index, title))
        if items:
            task, _, metric = row.key.partition("/")
            title = glossary.task(task).title
            several = sum(other.key.startswith(f"{task}/") for other in rows) > 1
            drawn.append((f"{title}, {metric.split(',')[0]}" if several else title, items))
    return drawn


def _agreement(comparison: Comparison) -> Section | None:
    rows = comparison.of("agreement")
    if not rows:
        return None
    lead = "How often a compressed model would say the same as the original on the same text; more agreement is better."
    table = _table("Agreement of every artifact with the original", comparison.names, rows, original=False)
    return Section("agreement", "Does it still say the same?", "Agreement", lead, (table,))


def _long_context(comparison: Comparison) -> Section | None:
    rows = comparison.of("long_context")
    if not rows:
        return None
    tasks = list(dict.fromkeys(row.key.rpartition("/")[0] for row in rows))
    first = next(report for report in comparison.reports if dig(report, "eval", "long_context"))
    sources = [("Original", fields(dig(first, "eval", "long_context", "before")))]
    for index, (name, report) in enumerate(zip(comparison.names, comparison.reports, strict=True)):
        if any(row.comparable(index) for row in rows):
            sources.append((shortened(name, 24), fields(dig(report, "eval", "long_context", "after"))))
    lead = "A fact is hidden in a long text and asked for at the end; 100 % is best, the original's score the ceiling."
    table = _table("Scores by task and length, mean over depths", comparison.names, rows)
    return Section("needles", "Finding a fact in a long text", "Long texts", lead, (overview(sources, tasks), table))


def _speed(comparison: Comparison) -> Section | None:
    rows = comparison.of("speed")
    if not rows:
        return None
    found = [
        {str(row["metric"]): row for row in dig(report, "efficiency", "rows") or []} for report in comparison.reports
    ]
    drawn = []
    for row in rows:
        items = []
        for index, (name, entry) in enumerate(zip(comparison.names, row.entries, strict=True)):
            if entry is not None and row.comparable(index) and (entry.value or 0) > 0:
                title = f"{name}, {row.label}: {entry.text} ({entry.change})"
                items.append(ratio_interval(found[index][row.key], index, _colour(index), title))
        if items:
            drawn.append((row.label, items))
    blocks: list[Block] = []
    if drawn:
        blocks.append(
            Chart(
                "efficiency",
                "Speed and memory as ratios to the original",
                lambda width: draw.intervals(width, drawn, 1.0, ("artifact ÷ original", ratio_text), log=True),
                _keys(comparison.names, [item.series for _, items in drawn for item in items]),
                reading="The line at 1× is the original. ↑ means that more is better, ↓ that less is.",
            )
        )
    blocks.append(_table("Speed and memory as ratios to the original", comparison.names, rows))
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        blocks += [Note(f"{name}: {note}") for note in notes(report)]
    lead = "Each model worked in turn with the original on one machine; the ratios say how it compares with it."
    return Section("speed", "Speed and memory", "Speed", lead, tuple(blocks))


def _cache(comparison: Comparison) -> Section | None:
    rows = comparison.of("kv")
    if not rows:
        return None
    lines = []
    if base := [(float(row.key), row.original / 1e6) for row in rows if row.original is not None]:
        lengths, sizes = zip(*base, strict=True)
        lines.append(draw.Line(lengths, sizes, SERIES - 1, "muted"))
    drawn = []
    for index, name in enumerate(comparison.names):
        found = [(float(row.key), entry) for row in rows if (entry := row.entries[index]) and not entry.differs]
        known = [(length, (entry.value or 0.0) / 1e6, f"{name}: {entry.text}") for length, entry in found]
        if known:
            lengths, sizes, titles = zip(*known, strict=True)
            lines.append(draw.Line(lengths, sizes, index, _colour(index), titles))
            drawn.append(index)
    chart = Chart(
        "kv",
        "Bytes of the KV cache by length of the conversation",
        lambda width: draw.lines(width, lines, ("tokens", lambda value: tokens(int(value))), ("MB", _plain)),
        (*_keys(comparison.names, drawn), Key("muted", "original", draw.MARKER_TEXT[SERIES - 1])),
    )
    lead = "What a model has read is kept in memory, and grows with every token; fewer bytes are better."
    table = _table("Bytes of the KV cache by length", comparison.names, rows)
    return Section("kv", "Memory of the conversation (KV cache)", "KV cache", lead, (chart, table))


def _errors(comparison: Comparison) -> Section | None:
    rows = comparison.of("errors")
    if not rows:
        return None
    lines = []
    for index, (name, report) in enumerate(zip(comparison.names, comparison.reports, strict=True)):
        layers = mean_errors(report)
        if rows[0].comparable(index) and layers:
            titles = tuple(f"{name}, layer {layer}: {percent_short(mean)}" for layer, mean in layers.items())
            means = tuple(100 * mean for mean in layers.values())
            lines.append(draw.Line(tuple(map(float, layers)), means, index, _colour(index), titles))
    blocks: list[Block] = []
    if lines:
        blocks.append(
            Chart(
                "errors",
                "Mean relative error of each layer",
                lambda width: draw.lines(width, lines, ("layer", _plain), ("mean relative error in %", _plain)),
                _keys(comparison.names, [line.series for line in lines]),
            )
        )
    blocks.append(_table("Relative error of the modules", comparison.names, rows, original=False))
    if any(entry and entry.differs for row in rows for entry in row.entries):
        text = (
            "Errors are measured on the calibration text, so those on another text can't be compared and aren't drawn."
        )
        blocks.append(Note(text))
    lead = "How much of each module's output is lost, as a share of that output; lower is better."
    return Section("errors", "Where compression hurts: error by layer", "Errors", lead, tuple(blocks))


def _origin(comparison: Comparison) -> Section:
    facts = [facts_of(report) for report in comparison.reports]
    keys = list(dict.fromkeys(key for own in facts for key in own))
    equal = [key for key in keys if len({own.get(key) for own in facts}) == 1]
    rows = tuple(
        (key, *(shortened(own.get(key, MISSING), 20) if key in HASHES else own.get(key, MISSING) for own in facts))
        for key in keys
        if key not in equal
    )
    blocks: list[Block] = []
    if rows:
        blocks.append(Table("What differs", ("", *comparison.names), rows, stacked=True))
    if equal:
        blocks += [Note("The same for all of them:"), Facts({key: facts[0][key] for key in equal}, HASHES)]
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        if report.get("command"):
            blocks.append(Source(str(report["command"]), f"Command of {name}"))
    lead = "What differs here may explain what differs above."
    return Section("origin", "How they were made", "Origin", lead, tuple(blocks))


def _table(caption: str, names: Sequence[str], rows: Sequence[Row], original: bool = True) -> Table:
    """Rows of the comparison; the original is the first column of figures."""
    body = []
    for row in rows:
        cells: list[str | Cell] = [Cell(row.label, row.about)]
        if original:
            cells.append(row.original_text or MISSING)
        cells += [_cell(entry) for entry in row.entries]
        body.append(tuple(cells))
    head = ("Figure", *(("Original",) if original else ()), *names)
    return Table(caption, head, tuple(body), frozenset(range(1, len(head))), stacked=True)


def _cell(entry: Entry | None) -> str | Cell:
    if entry is None:
        return MISSING
    if entry.differs:
        return Cell(entry.text, f"not comparable: {'; '.join(entry.differs)}", "muted")
    return Cell(entry.text, entry.change, entry.tone)


def _keys(names: Sequence[str], drawn: Iterable[int]) -> tuple[Key, ...]:
    """The legend of the artifacts that a chart shows."""
    return tuple(
        Key(_colour(index), shortened(names[index], NAME), draw.MARKER_TEXT[index % len(draw.MARKER_TEXT)])
        for index in sorted(set(drawn))
    )


def _colour(index: int) -> str:
    return f"series-{index % SERIES}"


def _plain(value: float) -> str:
    return signed_text(f"{value:,g}")


def _signed(value: float) -> str:
    return signed_text(f"{value:+g}" if value else "0")

"""The sections on size, speed and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report import draw, glossary
from compress.evalsuite.report.blocks import Block, Cell, Chart, Key, Note, Section, Table, Tone
from compress.evalsuite.report.needles import tokens
from compress.evalsuite.report.svg import Drawing
from compress.evalsuite.report.wording import MISSING, dig, is_number, nbytes, number, plural, quantity, sentence, times

SAME = 0.005
"""A ratio so near to one is called unchanged."""

_LESS = {"bytes": ("as large", "smaller"), "s": ("as long", "shorter"), "seconds": ("as long", "shorter")}


def speed(report: Mapping[str, Any]) -> Section | None:
    """Efficiency ratios with their spread; None if they weren't measured."""
    found = report.get("efficiency")
    rows = [row for row in dig(found, "rows") or [] if is_number(row.get("ratio"))]
    if not found or not rows:
        return None
    head = ("Figure", "Original", "Compressed", "Ratio", "Meaning")
    spread = f" of the rounds ({found['spread']})" if found.get("spread") else " of the rounds"
    body = tuple(_row(row) for row in rows)
    blocks: list[Block] = [
        Chart(
            "efficiency",
            "Speed and memory of the compressed model as ratios to the original",
            lambda width: _ratios(width, rows),
            (Key("good", "better", "●"), Key("bad", "worse", "●"), Key("neutral", "no clear difference", "●")),
            reading=f"The line at 1× is the original. The bar is the spread{spread}.",
        ),
        Table("Speed and memory, compressed against original", head, body, frozenset({1, 2, 3}), stacked=True),
        Note(_setting(found)),
        *(Note(f"Good to know: {note}") for note in notes(report)),
    ]
    return Section(
        "speed",
        "Speed and memory",
        "Speed",
        "Both models did the same work in turn on the same machine; of sizes and waits less is better, of speeds"
        " more is.",
        tuple(blocks),
    )


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the ratios should know, as sentences."""
    return [sentence(str(note)) for note in dig(report, "efficiency", "notes") or []]


def outcome(row: Mapping[str, Any]) -> tuple[Tone, str]:
    """Whether a ratio is good news, and in which words."""
    ratio, low, high = row["ratio"], row.get("ratio_low"), row.get("ratio_high")
    if is_number(low) and is_number(high) and low < 1 < high:
        return "", "No clear difference: the spread reaches over 1×"
    if abs(ratio - 1) <= SAME:
        return "", "Unchanged"
    up = row.get("higher_is_better")
    if up is None:
        return "", "Changed"
    better = (ratio > 1) == up
    many, few = ("as fast", "") if up else _LESS.get(str(row.get("unit")), ("as much", "less"))
    words = f"{times(1 / ratio)} {few}" if few and 0 < ratio < 1 else f"{times(ratio)} {many}"
    return ("good" if better else "bad"), f"{'Better' if better else 'Worse'}: {words}"


def cache(report: Mapping[str, Any]) -> Section | None:
    """Bytes of the KV cache by length, and beside other ways to keep it; None if they weren't measured."""
    blocks = [*_measured_cache(report), *_schemes(report)]
    if not blocks:
        return None
    return Section(
        "kv",
        "Memory of the conversation (KV cache)",
        "KV cache",
        "What the model has read is kept in memory, and grows with every token; fewer bytes are better."
        " Counted in allocated bytes.",
        tuple(blocks),
    )


def _schemes(report: Mapping[str, Any]) -> list[Block]:
    """The cache beside other ways to keep it, counted without running the model."""
    found = dig(report, "kv_bytes") or {}
    entries = [entry for entry in found.get("rows") or [] if is_number(entry.get("allocated"))]
    if not entries:
        return []
    own = found.get("scheme")
    rows = tuple(
        (
            Cell(f"{entry['length']:,} tokens: {_scheme(entry, own)}", str(dig(found, "about", entry["scheme"]) or "")),
            nbytes(entry.get("payload")),
            nbytes(entry.get("stored")),
            nbytes(entry["allocated"]),
            times(entry.get("ratio")),
        )
        for entry in entries
    )
    missing = [f"{name} ({why})" for name, why in (found.get("missing") or {}).items()]
    head = ("Cache", "Codes", "With scales and labels", "Allocated", "Smaller than 16 bits by")
    blocks: list[Block] = [
        Table("The cache beside other ways to keep it", head, rows, frozenset({1, 2, 3, 4}), stacked=True),
        Note(
            "Counted on caches that were filled with random numbers of the model's shape; the smallest isn't the best,"
            " since what a cache loses isn't in these figures."
        ),
    ]
    return [*blocks, Note(f"Not counted: {', '.join(missing)}.")] if missing else blocks


def _scheme(entry: Mapping[str, Any], own: Any) -> str:
    return "this cache" if entry["scheme"] == own else str(entry["scheme"])


def _measured_cache(report: Mapping[str, Any]) -> list[Block]:
    """What a benchmark of both models found."""
    found = [entry for entry in dig(report, "efficiency", "kv") or [] if is_number(entry.get("model_bytes"))]
    if not found:
        return []
    ratios = [entry["ratio"] for entry in found if is_number(entry.get("ratio"))]
    if ratios and all(abs(ratio - 1) <= SAME for ratio in ratios):
        text = "The cache takes as many bytes as the original's: nothing is saved here."
    else:
        longest = max(found, key=lambda entry: entry["length"])
        text = (
            f"At {longest['length']:,} tokens the cache takes {nbytes(longest['model_bytes'])} instead of"
            f" {nbytes(longest.get('baseline_bytes'))}."
        )
    rows = tuple(
        (
            f"{entry['length']:,} tokens",
            nbytes(entry.get("baseline_bytes")),
            nbytes(entry["model_bytes"]),
            times(entry.get("ratio")),
        )
        for entry in found
    )
    return [
        Note(text),
        Chart(
            "kv",
            "Bytes of the KV cache by length of the conversation",
            lambda width: _cache_chart(width, found),
            (Key("muted", "original"), Key("series-0", "compressed")),
        ),
        Table(
            "Bytes of the KV cache by length", ("Length", "Original", "Compressed", "Ratio"), rows, frozenset({1, 2, 3})
        ),
    ]


def size(report: Mapping[str, Any]) -> Section | None:
    """Bytes on disk beside those of the original; None if nothing was written."""
    artifact = report.get("artifact") or {}
    if not is_number(artifact.get("weight_bytes")):
        return None
    bars = [("Original at 16 bits a weight", artifact.get("bytes_16bit"), "muted")]
    bars.append((f"Compressed ({artifact.get('format', 'this artifact')})", artifact["weight_bytes"], "series-0"))
    for name, entry in (artifact.get("formats") or {}).items():
        if name != artifact.get("format"):
            bars.append((f"Also as {name}", dig(entry, "weight_bytes"), "series-0"))
    bars.append(("The file that was given", artifact.get("source_bytes"), "muted"))
    shown = [(label, value, colour) for label, value, colour in bars if is_number(value)]
    whole = artifact.get("bytes_16bit")
    rows = tuple(
        (label, nbytes(value), times(whole / value) if is_number(whole) and value else MISSING)
        for label, value, _ in shown
    )
    blocks: list[Block] = []
    source = artifact.get("source_bytes")
    if is_number(source) and source < artifact["weight_bytes"]:
        blocks.append(
            Note(
                f"The file that was given ({nbytes(source)}) is smaller than the result: it was compressed already,"
                " in another way."
            )
        )
    blocks.append(
        Chart(
            "size",
            "Bytes of the weights on disk",
            lambda width: draw.bars(
                width, [draw.Bar(label, value, nbytes(value), colour) for label, value, colour in shown]
            ),
        )
    )
    head = ("Weights", "Size", "Smaller than 16 bits by")
    blocks.append(Table("Bytes of the weights on disk", head, rows, frozenset({1, 2}), stacked=True))
    return Section(
        "size", "Size on disk", "Size", "How large the weights are as files; smaller is better.", tuple(blocks)
    )


def ratio_interval(row: Mapping[str, Any], series: int, colour: str, title: str) -> draw.Interval:
    """A ratio with its spread as an interval of a chart."""
    low, high = row.get("ratio_low"), row.get("ratio_high")
    known = is_number(low) and is_number(high)
    return draw.Interval(row["ratio"], low if known else None, high if known else None, colour, series, title)


def ratio_text(value: float) -> str:
    """A tick of a ratio axis."""
    return f"{value:g}×"


def _row(row: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    title, about = glossary.efficiency(str(row["metric"]))
    unit = str(row.get("unit") or "")
    tone, words = outcome(row)
    low, high = row.get("ratio_low"), row.get("ratio_high")
    spread = f"{number(low, 2)} to {times(high)}" if is_number(low) and is_number(high) and low != high else ""
    arrow = {True: " · ↑ more is better", False: " · ↓ less is better", None: ""}[row.get("higher_is_better")]
    return (
        Cell(title, f"{about}{arrow}"),
        quantity(row.get("baseline"), unit),
        quantity(row.get("model"), unit),
        Cell(times(row["ratio"]), spread, tone),
        words,
    )


def _ratios(width: int, rows: Sequence[Mapping[str, Any]]) -> Drawing:
    found = []
    for row in rows:
        if row["ratio"] <= 0:
            continue
        title = glossary.efficiency(str(row["metric"]))[0]
        tone, words = outcome(row)
        colour = {"good": "good", "bad": "bad"}.get(tone, "neutral")
        found.append((title, [ratio_interval(row, 0, colour, f"{title}: {times(row['ratio'])}. {words}")]))
    return draw.intervals(width, found, 1.0, ("compressed ÷ original", ratio_text), log=True)


def _cache_chart(width: int, found: Sequence[Mapping[str, Any]]) -> Drawing:
    items = []
    for entry in found:
        length = tokens(entry["length"])
        for who, key, colour in (("original", "baseline_bytes", "muted"), ("compressed", "model_bytes", "series-0")):
            if is_number(entry.get(key)):
                value = entry[key]
                items.append(
                    draw.Bar(
                        f"{length} {who}", value, nbytes(value), colour, f"{length} tokens, {who}: {nbytes(value)}"
                    )
                )
    return draw.bars(width, items)


def _setting(found: Mapping[str, Any]) -> str:
    parts = [f"Measured on {found.get('device', 'an unnamed device')}"]
    if found.get("threads"):
        parts.append(plural(found["threads"], "thread"))
    if found.get("dtype"):
        parts.append(str(found["dtype"]))
    if found.get("rounds"):
        parts.append(plural(found["rounds"], "round") + " of each model in turn")
    text = ", ".join(parts)
    if found.get("prompt_tokens") and found.get("new_tokens"):
        text += f"; {found['prompt_tokens']:,} tokens read, {found['new_tokens']:,} written"
    return f"{text}. The original here is {found['baseline']}." if found.get("baseline") else f"{text}."

"""The top of the page: the outcome in a few sentences, and four tiles."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from compress.evalsuite.report.blocks import Note, Summary, Tile, Tone
from compress.evalsuite.report.costs import outcome
from compress.evalsuite.report.findings import Finding, findings
from compress.evalsuite.report.layers import modules
from compress.evalsuite.report.wording import (
    change,
    dig,
    is_number,
    listed,
    nbytes,
    number,
    percent,
    plural,
    quantity,
    times,
)

UNMEASURED = "not measured"


def summary(report: Mapping[str, Any], name: str = "") -> Summary:
    """Size, bits a weight, quality kept and speed."""
    return Summary((size_tile(report), bits_tile(report), quality_tile(report), speed_tile(report)), name)


def verdict(report: Mapping[str, Any]) -> tuple[Note, ...]:
    """The outcome in a few sentences, good news and bad."""
    notes = [_made(report)]
    found = findings(report)
    if found:
        notes.append(_scored(found))
    broken = dig(report, "weights", "degraded")
    if broken:
        text = f"{plural(len(broken), 'module')} could only be rounded to nearest: unusable calibration inputs."
        notes.append(Note(text, "bad"))
    return tuple(notes)


def size_tile(report: Mapping[str, Any]) -> Tile:
    """Bytes on disk, with the ratio to 16 bits a weight."""
    weight, whole = dig(report, "artifact", "weight_bytes"), dig(report, "artifact", "bytes_16bit")
    if not is_number(weight):
        return Tile("Size", UNMEASURED, "The report names no files.", "muted")
    if not is_number(whole):
        return Tile("Size", nbytes(weight), "on disk")
    ratio = whole / weight
    if ratio >= 1:
        return Tile("Size", nbytes(weight), f"{times(ratio)} smaller than at 16 bits ({nbytes(whole)})", "good")
    return Tile("Size", nbytes(weight), f"{times(1 / ratio)} larger than at 16 bits ({nbytes(whole)})", "bad")


def bits_tile(report: Mapping[str, Any]) -> Tile:
    """Bits a weight over the whole file, with those of the linear layers."""
    value = dig(report, "artifact", "bits_per_weight")
    if not is_number(value):
        return Tile("Bits per weight", UNMEASURED, "The report names no files.", "muted")
    widths = sorted({module.bits for module in modules(report) if module.bits is not None})
    inner = f"; the layers themselves: {listed([str(width) for width in widths])}" if widths else ""
    return Tile("Bits per weight", f"{value:.2f}", f"over the whole file, 16 before{inner}")


def quality_tile(report: Mapping[str, Any]) -> Tile:
    """How near the compressed model is to the original, by the best measure that the report has."""
    found = findings(report)
    perplexity = next((one for one in found if one.task == "perplexity" and one.before and one.after is not None), None)
    shares = [one for one in found if one.share and one.before is not None and one.after is not None]
    agreement = dig(report, "eval", "divergence", "top1_agreement")
    if is_number(agreement):
        more = f"; perplexity {_pair(perplexity)}" if perplexity else ""
        return Tile(
            "Quality kept", percent(agreement), f"of next tokens are the original's choice{more}", _tone(perplexity)
        )
    if perplexity is not None and perplexity.before and perplexity.after is not None:
        ratio = times(perplexity.after / perplexity.before)
        return Tile(
            "Quality", ratio, f"the original's perplexity, less is better: {_pair(perplexity)}", _tone(perplexity)
        )
    if shares:
        before, after = fmean(one.before or 0.0 for one in shares), fmean(one.after or 0.0 for one in shares)
        value = change(100 * (after - before), 1, "points")
        about = f"mean of {plural(len(shares), 'score')}: {percent(before)} → {percent(after)}"
        return Tile("Quality", value, about, "bad" if after < before else "")
    return Tile("Quality kept", UNMEASURED, "This run scored nothing (recipe section eval).", "muted")


def speed_tile(report: Mapping[str, Any]) -> Tile:
    """Writing speed as a ratio to the original's."""
    rows = dig(report, "efficiency", "rows") or []
    row = next(
        (row for row in rows if row.get("metric") == "decode_tokens_per_second" and is_number(row.get("ratio"))), None
    )
    if row is None:
        return Tile("Speed", UNMEASURED, "compress bench measures it beside the original.", "muted")
    tone = outcome(row)[0]
    unit = str(row.get("unit") or "")
    figures = f"{quantity(row.get('baseline'), '')} → {quantity(row.get('model'), unit)}"
    what = "no clear difference in writing speed" if not tone else "the original's writing speed"
    device = dig(report, "efficiency", "device")
    return Tile("Speed", times(row["ratio"]), f"{what}: {figures}" + (f" on {device}" if device else ""), tone)


def _made(report: Mapping[str, Any]) -> Note:
    model = dig(report, "model", "name") or "A model"
    recipe = dig(report, "recipe", "name")
    text = f"{model} was compressed" + (f" with the recipe {recipe}" if recipe else "")
    weight, whole = dig(report, "artifact", "weight_bytes"), dig(report, "artifact", "bytes_16bit")
    if is_number(weight) and is_number(whole) and weight:
        text += f". Its weights now take {nbytes(weight)}; at 16 bits a weight they would take {nbytes(whole)}"
    return Note(f"{text}.")


def _scored(found: list[Finding]) -> Note:
    worse = [one.title() for one in found if one.tone == "bad" and one.p is not None]
    better = [one.title() for one in found if one.tone == "good" and one.p is not None]
    untested = [one for one in found if one.p is None and one.before != one.after]
    level = len(found) - len(worse) - len(better) - len(untested)
    parts = []
    if worse:
        parts.append(f"clearly worse on {listed(_unique(worse))}")
    if better:
        parts.append(f"clearly better on {listed(_unique(better))}")
    if level:
        parts.append(f"not clearly different in {plural(level, 'other score' if worse or better else 'score')}")
    if untested:
        parts.append(f"changed in {plural(len(untested), 'score')} that weren't tested against chance")
    return Note(
        f"Against the original, the compressed model is {listed(parts)}." if parts else "All scores are unchanged."
    )


def _pair(one: Finding | None) -> str:
    return "" if one is None else f"{number(one.before, 2)} → {number(one.after, 2)}"


def _tone(one: Finding | None) -> Tone:
    return one.tone if one is not None else ""


def _unique(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))

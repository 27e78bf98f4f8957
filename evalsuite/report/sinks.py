"""The section on attention calibration: which heads give later sinks less weight, and what it brought."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report import draw
from compress.evalsuite.report.blocks import Block, Chart, Facts, Key, Note, Scale, Section, Table, Tone
from compress.evalsuite.report.svg import RAMP, Drawing
from compress.evalsuite.report.wording import dig, is_number, number, p_value, percent, plural, sentence, signed_text


def calibration(report: Mapping[str, Any]) -> Section | None:
    """Heads, sinks of every layer, and the loss on questions held out; None if nothing was to be calibrated."""
    found = report.get("act")
    if not found:
        return None
    blocks: list[Block] = [Note(sentence(str(found["summary"])), _tone(found)), Facts(_facts(found))]
    blocks += _held_out(found)
    blocks += _map(found.get("layers") or [])
    blocks += _heads(found.get("heads") or [])
    return Section(
        "calibration",
        "Attention sinks with less weight",
        "Calibration",
        "Some tokens behind the first draw much attention without being of interest. Heads whose answers get likelier"
        " without them give them less; the loss is that of questions, in nats, and lower is better.",
        tuple(blocks),
    )


def _tone(found: Mapping[str, Any]) -> Tone:
    """Good where it is applied and significantly better on questions held out."""
    if not found.get("calibrated"):
        return "bad" if found.get("heads") else ""
    chance = dig(found, "held_out", "loss", "p_value")
    return "good" if is_number(chance) and chance < 0.05 else ""


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    bound = found.get("threshold")
    sink = f"above {percent(bound)}" if is_number(bound) else f"above {found['alpha']:g} times the average"
    entries = {
        "Weight of sinks": f"{found['beta']:g} of what it was",
        "A sink's attention": sink,
        "Heads chosen by": "the choice of an answer" if found.get("objective") == "choice" else "the right answer",
    }
    if asked := found.get("questions"):
        entries["Questions"] = f"{plural(asked['choosing'], 'question')} choose, {asked['held_out']} are held out"
        entries["From"] = ", ".join(asked["sources"])
    return entries


def _held_out(found: Mapping[str, Any]) -> list[Block]:
    """What the chosen heads change on questions that didn't choose them."""
    rows = []
    for name, what in (("loss", "loss, nats"), ("right", "right answers")):
        one = dig(found, "held_out", name)
        if one:
            told = f"{one['difference']:+.4f}" if name == "loss" else f"{100 * one['difference']:+.1f} %"
            rows.append((what, signed_text(told), str(one["n"]), p_value(one["p_value"])))
    if not rows:
        return []
    head = ("Measure", "Change", "Questions", "p")
    return [Table("On questions held out, with the chosen heads calibrated", head, tuple(rows), frozenset({1, 2, 3}))]


def _map(layers: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Layers by KV heads: the mean slope of the loss by a head's weight of sinks."""
    slopes = [own["slopes"] for own in layers]
    largest = max((abs(value) for row in slopes for value in row), default=0.0)
    if not largest:
        return []
    cells = {
        (layer, head): draw.Cell(
            f"cool-{min(RAMP - 1, int(RAMP * max(0.0, value) / largest))}",
            "●" if head in layers[layer]["calibrated"] else "",
            f"layer {layer}, KV head {head}: {value:.3g}; {number(layers[layer]['sinks'], 2)} sinks a query head",
        )
        for layer, row in enumerate(slopes)
        for head, value in enumerate(row)
    }
    rows, columns = ([str(index) for index in range(count)] for count in (len(slopes), len(slopes[0])))

    def drawn(width: int) -> Drawing:
        return draw.grids(width, [("", cells)], rows, columns, ("layer", "KV head"))

    legend = (Key("ink", "a head that is calibrated", "●"),) if any(own["calibrated"] for own in layers) else ()
    what = "What the loss gains as a head's sinks lose weight, mean of all questions"
    scale = Scale("cool", "nothing, or it rises", number(largest))
    return [Chart("sinks-map", what, drawn, legend, scale, "Every field is a KV head; a mean isn't a test.")]


def _heads(heads: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not heads:
        return []
    rows = tuple(
        (f"layer {own['layer']}, KV head {own['head']}", number(own["t"], 2), p_value(own["p"])) for own in heads
    )
    return [Table("Heads that gain", ("Head", "t", "p"), rows, frozenset({1, 2}), folded=True)]

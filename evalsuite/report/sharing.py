"""The section on layers that share attention: how alike layers are, which of them share, and what it cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report import draw
from compress.evalsuite.report.blocks import Block, Cell, Chart, Key, Note, Scale, Section, Table
from compress.evalsuite.report.svg import RAMP, Drawing
from compress.evalsuite.report.wording import MISSING, change, dig, is_number, number, percent, sentence

STEPS = {
    "dense": "the model as it was",
    "copied": "layers share, nothing fitted",
    "fitted": "after the refit",
    "trained": "after distillation",
}
ENDED = {
    "budget": "The search ended where the next layer would have gone over the budget.",
    "limit": "The search ended at the number of layers that were to share at most.",
    "layers": "The search ended when no layer was left that might share.",
}
TAKEN = {"attn": "attention", "kv": "keys and values"}


def sharing(report: Mapping[str, Any]) -> Section | None:
    """Similarity of the layers, pairs, and what every step cost; None if nothing was to share."""
    found = report.get("share")
    if not found:
        return None
    pairs = found.get("layers") or []
    blocks: list[Block] = [Note(sentence(str(found["summary"])), "" if pairs else "bad")]
    blocks += _steps(found)
    blocks += _savings(found)
    blocks += _map(found, pairs)
    blocks += _pairs(pairs)
    blocks += _search(found)
    blocks += _tried(found)
    what = TAKEN.get(str(found.get("mode")), "attention")
    return Section(
        "share",
        f"Layers that share {what}",
        "Sharing",
        f"A layer that takes {what} of an earlier one needs fewer weights and keeps less of what was read. What that"
        " costs is perplexity, here on calibration text that was held out; lower is better.",
        tuple(blocks),
    )


def _steps(found: Mapping[str, Any]) -> list[Block]:
    """Perplexity with nothing shared, with copies alone, and with what makes up for it."""
    values = dig(found, "held_out", "perplexity") or {}
    dense = values.get("dense")
    if not is_number(dense):
        return []
    rows = []
    for name, meaning in STEPS.items():
        value = values.get(name)
        if is_number(value) and not (name == "fitted" and found.get("refit") == "none"):
            grown = "" if name == "dense" else change(100 * (value / dense - 1), 2)
            rows.append((meaning, number(value, 2), grown))
    return [Table("Perplexity on held-out text", ("Step", "Perplexity", "Growth"), tuple(rows), frozenset({1, 2}))]


def _savings(found: Mapping[str, Any]) -> list[Block]:
    """Parameters, cache and time of a token, before and after."""
    rows = []
    if is_number(gone := found.get("dropped_share")):
        rows.append(("parameters", f"{percent(gone, 1)} less", f"{found.get('dropped_parameters', 0):,} weights"))
    decode = found.get("decode") or {}
    if is_number(held := decode.get("dense_bytes")) and is_number(own := decode.get("shared_bytes")):
        rows.append(("KV cache", f"{percent(1 - own / held, 1)} less", f"{held / 1e6:.1f} MB -> {own / 1e6:.1f} MB"))
    if is_number(before := decode.get("dense_ms")) and is_number(after := decode.get("shared_ms")):
        faster = f"{change(100 * decode['faster'], 1)} tokens a second"
        rows.append((f"a token behind {decode['tokens']:,}", faster, f"{before:.1f} ms -> {after:.1f} ms"))
    if not rows:
        return []
    caption = "What it saves; times in this run, the model against itself, before weights were quantized"
    return [Table(caption, ("", "", "Measured"), tuple(rows), frozenset({1, 2}))]


def _map(found: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Layers by layers: cosine of their attention, or distance of keys and values."""
    alike, apart = found.get("similarity"), found.get("distances")
    values = alike or apart
    if not values:
        return []
    taken = {(pair["layer"], pair["source"]) for pair in pairs}
    below = [(row, column) for row in range(len(values)) for column in range(row)]
    known = [values[row][column] for row, column in below if values[row][column]]
    low, high = min(known, default=0.0), max(known, default=1.0)
    cells = {
        (row, column): draw.Cell(
            f"cool-{_step(values[row][column], low, high)}",
            "●" if (row, column) in taken else "",
            f"layer {row} and layer {column}: {values[row][column]:.3g}",
        )
        for row, column in below
        if values[row][column]
    }
    names = [str(index) for index in range(len(values))]

    def drawn(width: int) -> Drawing:
        return draw.grids(width, [("", cells)], names, names, ("takes", "gives"))

    what = "Cosine between attention probabilities of two layers" if alike else "Distance between mean keys and values"
    legend = (Key("ink", "a pair that shares", "●"),) if pairs else ()
    scale = Scale("cool", f"{low:.2f}" if alike else f"{low:.3g}", f"{high:.2f}" if alike else f"{high:.3g}")
    reading = "Every field is a pair of layers: the row would take from the column."
    return [Chart("share-map", what, drawn, legend, scale, reading)]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not pairs:
        return []
    rows = tuple(
        (
            Cell(f"layer {pair['layer']}", _heads(pair.get("head_map"))),
            f"layer {pair['source']}",
            number(pair["cosine"], 2) if is_number(pair.get("cosine")) else MISSING,
            percent(pair.get("error_before")) if is_number(pair.get("error_before")) else MISSING,
            percent(pair.get("error_after")) if is_number(pair.get("error_after")) else MISSING,
        )
        for pair in pairs
    )
    head = ("Takes", "From", "Cosine", "Output error", "After the refit")
    title = "Pairs, and the squared error of the layer's attention output as a share of the output"
    return [Table(title, head, rows, frozenset({2, 3, 4}), stacked=True), *_scores(pairs)]


def _scores(pairs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What low-rank residuals make up for in the scores."""
    rows = tuple(
        (
            f"layer {pair['layer']}",
            str(pair["score_rank"]),
            percent(pair["score_error_before"]),
            percent(pair["score_error_after"]),
        )
        for pair in pairs
        if pair.get("score_rank")
    )
    title = "Scores that are taken, corrected by channels of the layer's own; error as a share of the scores' variance"
    head = ("Layer", "Channels kept", "Scores as taken", "Corrected")
    return [Table(title, head, rows, frozenset({1, 2, 3}), stacked=True)] if rows else []


def _heads(head_map: Sequence[int] | None) -> str:
    return "" if head_map is None else f"heads {', '.join(map(str, head_map))}"


def _search(found: Mapping[str, Any]) -> list[Block]:
    state = found.get("search")
    if not state or not state.get("measured"):
        return []
    dense = state["dense"]
    rows = tuple(
        (
            Cell(f"layer {one['layer']} from {one['source']}", "added" if one["added"] else ""),
            str(one["shared"]),
            change(100 * math.expm1(one["nll"] - dense), 2),
            percent(one["before"]) if is_number(one["before"]) else MISSING,
            percent(one["after"]) if is_number(one["after"]) else MISSING,
        )
        for one in state["measured"]
    )
    head = ("Tried", "Beside", "Perplexity", "Output error", "After the refit")
    table = Table("All layers that were tried", head, rows, frozenset({1, 2, 3, 4}), folded=True, stacked=True)
    return [Note(ENDED.get(str(state.get("ended")), "")), table] if state.get("ended") else [table]


def _tried(found: Mapping[str, Any]) -> list[Block]:
    tried = found.get("tried")
    if not tried:
        return []
    rows = tuple(
        (
            Cell(f"layer {one['layer']} from {one['source']}", "added" if one["added"] else "left out"),
            number(one["distance"], 3),
            f"{one['cosine']:.4f}",
        )
        for one in tried
    )
    head = ("Tried", "Distance", "Cosine of last hidden states")
    return [Table("All pairs that were tried", head, rows, frozenset({1, 2}), folded=True)]


def _step(value: float, low: float, high: float) -> int:
    return RAMP // 2 if high <= low else min(RAMP - 1, int(RAMP * (value - low) / (high - low)))

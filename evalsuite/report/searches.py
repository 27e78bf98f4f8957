"""The section on searches for far tokens: what they see of the true attention, layer by layer, and what they cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report.blocks import Block, Note, Section, Table
from compress.evalsuite.report.wording import is_number, number, percent, sentence, times


def searches(report: Mapping[str, Any]) -> Section | None:
    """Recall and time of every layer that searches, and how well SEA's estimators guess; None if nothing searches."""
    found = report.get("sparse")
    if not found:
        return None
    blocks: list[Block] = [Note(sentence(str(found["summary"])))]
    blocks += _layers(found.get("layers") or [], found.get("measured_tokens") or 0)
    blocks += _estimators(found.get("estimators") or [])
    return Section(
        "searches",
        "Tokens that are searched for",
        "Search",
        "On long texts a block of rows attends the first tokens, the newest, and blocks that a search finds. Recall is"
        " the share of the true attention that it sees by them; higher is better.",
        tuple(blocks),
    )


def _layers(layers: Sequence[Mapping[str, Any]], tokens: int) -> list[Block]:
    rows = tuple(
        (
            f"layer {own['layer']}",
            percent(own["recall"]),
            percent(own["recall_of_sink_and_window"]),
            number(own["search_seconds"], 3),
            number(own["attention_seconds"], 3),
            times(own["dense_seconds"] / spent) if (spent := own["search_seconds"] + own["attention_seconds"]) else "",
        )
        for own in layers
    )
    if not rows:
        return []
    head = ("Layer", "Recall", "Without the search", "Search, s", "Attention, s", "Dense / both")
    title = f"A prompt of {tokens:,} tokens, processor seconds of the heads that search"
    return [Table(title, head, rows, frozenset(range(1, 6)), stacked=True)]


def _estimators(layers: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = tuple(
        (f"layer {own['layer']}", *(number(own.get(name), 3) for name in ("before", "after", "mean_map", "grid")))
        for own in layers
        if is_number(own.get("after"))
    )
    head = ("Layer", "Before the fit", "Estimator", "Average map", "Grid alone")
    title = "Divergence of estimated from true attention, nats a row, on windows that nothing was learnt from"
    return [Table(title, head, rows, frozenset(range(1, 5)), folded=True)] if rows else []

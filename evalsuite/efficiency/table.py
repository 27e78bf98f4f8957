"""The efficiency section of a report, for a terminal."""

from typing import Any

LABELS = {
    "weight_bytes_on_disk": "weights on disk",
    "weight_bytes_in_memory": "weights in memory",
    "peak_memory": "peak memory",
    "peak_memory_generating": "peak memory while answering",
    "time_to_first_token": "time to first token",
    "prefill_tokens_per_second": "prefill",
    "decode_tokens_per_second": "decode",
}
_KV_LINES = 2


def table(section: dict[str, Any]) -> list[str]:
    """At most fourteen lines: what was measured, a table, and what it means. All lengths are in the JSON only."""
    threads, rounds = (f"{section[key]} {key[:-1] if section[key] == 1 else key}" for key in ("threads", "rounds"))
    lines = [
        f"{section['model']} against {section['baseline']}: {section['device']}, {threads}, {section['dtype']}, "
        f"{section['prompt_tokens']} + {section['new_tokens']} tokens, {rounds}",
        f"| | baseline | model | model / baseline ({section['spread']}) |",
        "|---|---:|---:|---:|",
    ]
    for row in section["rows"]:
        figures = [_figure(row[side], row["unit"]) for side in ("baseline", "model")]
        lines.append(_line(LABELS[row["metric"]], figures, _ratio(row)))
    kv = section["kv"]
    for row in kv if len(kv) <= _KV_LINES else (kv[0], kv[-1]):
        figures = [_figure(row[f"{side}_bytes"], "bytes") for side in ("baseline", "model")]
        lines.append(_line(f"KV cache of {row['length']:,} tokens", figures, _ratio(row)))
    return [*lines, *(f"note: {note}" for note in section["notes"])]


def _line(label: str, figures: list[str], ratio: str) -> str:
    return f"| {label} | {' | '.join(figures)} | {ratio} |"


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value:,.0f} B"
    return f"{value:.3g} {unit}"


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "-"
    low, high = row.get("ratio_low"), row.get("ratio_high")
    exact = low is None or low == high
    return f"{row['ratio']:.2f}x" if exact else f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})"

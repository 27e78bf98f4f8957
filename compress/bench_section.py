"""What a benchmark measured, as the section ``efficiency`` of a report."""

from dataclasses import asdict, dataclass, field
from typing import Any

from compress.bench_side import Facts, Settings
from compress.evalsuite.efficiency import Pass, Row, exact_row, mean_pass, paired_row
from compress.evalsuite.efficiency.paired import spread_name

SIDES = ("baseline", "model")
_PACKED_BITS = 12  # below it a file holds packed codes: the next wider type that models are computed in has 16 bits


@dataclass
class Measured:
    """Everything that was found, by side: ``"baseline"`` and ``"model"``.

    Attributes:
        facts: of the loaded models.
        passes: for every round, the answers of a side.
        peaks: for every round, the memory high water of each answer; None where the system doesn't say.
        kv: bytes of the cache at each length.
    """

    facts: dict[str, Facts] = field(default_factory=dict)
    passes: list[dict[str, list[Pass]]] = field(default_factory=list)
    peaks: list[dict[str, list[int | None]]] = field(default_factory=list)
    kv: dict[str, list[int]] = field(default_factory=dict)

    def begin_round(self) -> tuple[dict[str, list[Pass]], dict[str, list[int | None]]]:
        """Empty lists for the answers and peaks of one more round."""
        self.passes.append({side: [] for side in SIDES})
        self.peaks.append({side: [] for side in SIDES})
        return self.passes[-1], self.peaks[-1]


def section(measured: Measured, names: dict[str, str], settings: Settings, rounds: int) -> dict[str, Any]:
    """The section, as JSON types."""
    facts = measured.facts
    kv = zip(settings.lengths, *(measured.kv.get(side, []) for side in SIDES), strict=True)
    return {
        "device": facts["baseline"].device,
        "threads": facts["baseline"].threads,
        "packed_threads": settings.packed_threads,
        "dtype": ", ".join(dict.fromkeys(facts[side].dtype for side in SIDES)),
        "rounds": rounds,
        "spread": spread_name(rounds),
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "seed": settings.seed,
        "baseline": names["baseline"],
        "model": names["model"],
        "rows": [asdict(row) for row in (*_memory_rows(measured), *_time_rows(measured, settings))],
        "kv": [
            {"length": n, "baseline_bytes": before, "model_bytes": after, "ratio": after / before if before else None}
            for n, before, after in kv
        ],
        "notes": _notes(names, facts),
    }


def _memory_rows(measured: Measured) -> list[Row]:
    before, after = (measured.facts[side] for side in SIDES)
    rows = []
    if before.disk is not None and after.disk is not None:
        rows.append(exact_row("weight_bytes_on_disk", before.disk, after.disk))
    rows.append(exact_row("weight_bytes_in_memory", before.memory, after.memory))
    peaks = {side: [_highest(done[side]) for done in measured.peaks] for side in SIDES}
    highest = {side: _highest([measured.facts[side].load_peak, *peaks[side]]) for side in SIDES}
    if all(highest.values()):
        rows.append(paired_row("peak_memory", "bytes", [highest["baseline"]], [highest["model"]], False))
    if before.resettable and after.resettable and all(map(all, peaks.values())):
        rows.append(paired_row("peak_memory_generating", "bytes", peaks["baseline"], peaks["model"], False))
    return rows


def _highest(peaks: list[int | None]) -> int:
    """The largest; 0 if nothing is known."""
    return max((peak for peak in peaks if peak is not None), default=0)


def _time_rows(measured: Measured, settings: Settings) -> list[Row]:
    means = {side: [mean_pass(done[side]) for done in measured.passes] for side in SIDES}

    def row(metric: str, unit: str, figure: Any, higher_is_better: bool) -> Row:
        before, after = ([figure(done) for done in means[side]] for side in SIDES)
        return paired_row(metric, unit, before, after, higher_is_better)

    prompt, further = settings.prompt_tokens, settings.new_tokens - 1
    return [
        row("time_to_first_token", "s", lambda done: done.first_token, False),
        row("prefill_tokens_per_second", "tokens/s", lambda done: prompt / done.prefill, True),
        row("decode_tokens_per_second", "tokens/s", lambda done: further / done.decode, True),
    ]


def _notes(names: dict[str, str], facts: dict[str, Facts]) -> list[str]:
    """What a reader of the ratios should know, found from the bytes."""
    notes = []
    before, after = (_Bits.of(facts[side]) for side in SIDES)
    if after is not None and after.unpacked:
        notes.append(
            f"{names['model']} takes {after.disk:.1f} bits a weight on disk and {after.memory:.0f} in memory here: "
            "transformers unpacked the weights while loading, so packing saves disk but neither memory nor time"
        )
    if before is not None and before.unpacked:
        dense = facts["baseline"].elements * 2
        ratio = (facts["model"].disk or 0) / dense
        notes.append(
            f"the file of {names['baseline']} is itself quantized ({before.disk:.1f} bits a weight); "
            f"at 16 bits it would be {dense / 1e6:.1f} MB" + (f", the ratio on disk {ratio:.2f}x" if ratio else "")
        )
    return notes


@dataclass(frozen=True)
class _Bits:
    """Bits a weight on disk and in memory."""

    disk: float
    memory: float

    @classmethod
    def of(cls, facts: Facts) -> "_Bits | None":
        if facts.disk is None or not facts.elements:
            return None
        return cls(facts.disk * 8 / facts.elements, facts.memory * 8 / facts.elements)

    @property
    def unpacked(self) -> bool:
        return self.disk < _PACKED_BITS <= self.memory

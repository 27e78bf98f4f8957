"""The sections on weights: error and bits of every module, layer by layer."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from compress.evalsuite.report import draw, glossary
from compress.evalsuite.report.blocks import Block, Cell, Chart, Key, Note, Scale, Section, Table
from compress.evalsuite.report.svg import RAMP, Drawing
from compress.evalsuite.report.wording import MISSING, dig, is_number, listed, percent, plural, three_digits

WORST = 12
_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_BITS = {2: "cool-0", 3: "cool-2", 4: "cool-4", 8: "cool-6"}


@dataclass(frozen=True)
class Module:
    """One quantized module: its layer (None outside the layers), its short name and its figures."""

    name: str
    layer: int | None
    kind: str
    bits: int | None
    group_size: int | None
    error: float | None
    note: str
    degraded: bool

    @property
    def label(self) -> str:
        """``layer 12 · down_proj``."""
        return self.kind if self.layer is None else f"layer {self.layer} · {self.kind}"


def modules(report: Mapping[str, Any]) -> list[Module]:
    """The quantized modules of a report."""
    return [_module(entry) for entry in dig(report, "weights", "modules") or []]


def errors(report: Mapping[str, Any]) -> Section | None:
    """Relative error of every module, the worst first; None if the weights weren't compressed."""
    found = modules(report)
    if not found:
        return None
    worst = sorted((m for m in found if m.error is not None), key=lambda m: -(m.error or 0.0))
    blocks: list[Block] = [Note(text, "bad") for text in _degraded(report)]
    if not worst:
        blocks.append(
            Note("No errors were measured: this recipe used no calibration text, and the error is defined by it.")
        )
        blocks.append(_table(found))
    else:
        blocks += [_worst(worst), *_error_map(found), _table(worst + [m for m in found if m.error is None])]
    return Section(
        "errors",
        "Where compression hurts: error by layer",
        "Errors",
        "How much of each module's output is lost, as a share of that output, on the calibration text; lower is"
        " better.",
        tuple(blocks),
    )


def bits(report: Mapping[str, Any]) -> Section | None:
    """Bits of every module; None if the weights weren't compressed."""
    found = [module for module in modules(report) if module.bits is not None]
    if not found:
        return None
    widths = sorted({module.bits for module in found if module.bits is not None})
    if len(widths) == 1:
        text = f"All {plural(len(found), 'module')} are stored with {plural(widths[0], 'bit')} a weight."
    else:
        counts = [f"{sum(m.bits == width for m in found):,} with {plural(width, 'bit')}" for width in widths]
        text = f"Of {plural(len(found), 'module')}, {listed(counts)} a weight."
    blocks: list[Block] = [Note(text)]
    if placed := _placed(found):
        cells = {
            key: draw.Cell(
                _bits_colour(m.bits or 16), str(m.bits) if len(widths) > 1 else "", f"{m.label}: {m.bits} bits"
            )
            for key, m in placed.items()
        }
        legend = tuple(Key(_bits_colour(width), plural(width, "bit")) for width in widths)
        blocks.append(
            Chart("bits", "Bits a weight of every module, by layer", lambda width: _map(width, cells, placed), legend)
        )
        blocks.append(_bits_table(placed))
    blocks.append(Note(_rest(report)))
    return Section(
        "bits",
        "Bits map: where they went",
        "Bits",
        "How many bits each weight is stored with; fewer bits make a smaller file and a larger error, 16 is"
        " uncompressed.",
        tuple(blocks),
    )


def mean_errors(report: Mapping[str, Any]) -> dict[int, float]:
    """The mean relative error of every layer's modules."""
    known = [module for module in modules(report) if module.layer is not None and module.error is not None]
    return {
        layer: fmean(module.error or 0.0 for module in known if module.layer == layer)
        for layer in sorted({module.layer for module in known if module.layer is not None})
    }


def level(value: float, low: float, high: float) -> int:
    """Step of a colour ramp for a value between the ends, by its logarithm."""
    if high <= low:
        return RAMP // 2
    return min(RAMP - 1, int(RAMP * math.log(value / low) / math.log(high / low)))


def _worst(worst: Sequence[Module]) -> Chart:
    items = [
        draw.Bar(
            module.label,
            module.error or 0.0,
            percent_short(module.error),
            "bad" if module.degraded else "series-0",
            f"{module.name}: {percent_short(module.error)}",
        )
        for module in worst[:WORST]
    ]
    title = f"The {len(items)} modules with the largest error, worst first"
    return Chart("worst", title, lambda width: draw.bars(width, items))


def _error_map(found: Sequence[Module]) -> list[Block]:
    known = [module for module in found if module.error is not None and module.error > 0]
    placed = _placed(known)
    if not placed:
        return []
    values = [module.error or 0.0 for module in placed.values()]
    low, high = min(values), max(values)
    cells = {
        key: draw.Cell(f"warm-{level(m.error or low, low, high)}", "", f"{m.label}: {percent_short(m.error)}")
        for key, m in placed.items()
    }
    ends = (percent_short(low), percent_short(high))
    reading = "Every field is one module of one layer; each step of the colour is the same factor."
    chart = Chart(
        "errors",
        "Relative error of every module, by layer",
        lambda width: _map(width, cells, placed),
        (),
        Scale("warm", *ends),
        reading,
    )
    parts = "; ".join(
        f"{name.removesuffix('_proj')}: {glossary.MODULES[name]}" for name in _kinds(placed) if name in glossary.MODULES
    )
    meaning = "The error of a module is the squared difference of its output, divided by the squared output. "
    return [chart, Note(meaning + (f"{parts}." if parts else ""), "muted")]


def _placed(found: Sequence[Module]) -> dict[tuple[int, int], Module]:
    """Modules by (row, column) of the map: kinds down, layers across."""
    inside = [module for module in found if module.layer is not None]
    kinds = list(dict.fromkeys(module.kind for module in inside))
    return {(kinds.index(module.kind), module.layer): module for module in inside if module.layer is not None}


def _kinds(placed: Mapping[tuple[int, int], Module]) -> list[str]:
    kinds = {row: module.kind for (row, _), module in placed.items()}
    return [kinds[row] for row in sorted(kinds)]


def _map(width: int, cells: Mapping[tuple[int, int], draw.Cell], placed: Mapping[tuple[int, int], Module]) -> Drawing:
    """Layers across on a page, down on a phone."""
    kinds = _kinds(placed)
    if all(kind.endswith("_proj") for kind in kinds):
        kinds = [kind.removesuffix("_proj") for kind in kinds]
    layers = [str(layer) for layer in range(max(layer for _, layer in placed) + 1)]
    if width < draw.WIDE:
        turned = {(column, row): cell for (row, column), cell in cells.items()}
        return draw.grids(width, [("", turned)], layers, kinds, ("layer", ""))
    return draw.grids(width, [("", cells)], kinds, layers, ("", "layer"))


def _table(found: Sequence[Module]) -> Table:
    rows = [
        (
            module.name,
            MISSING if module.error is None else percent_short(module.error),
            str(module.bits or MISSING),
            "whole row" if module.group_size == -1 else str(module.group_size or MISSING),
            module.note or ("rounded to nearest" if module.degraded else ""),
        )
        for module in found
    ]
    head = ("Module", "Relative error", "Bits", "Group", "Remark")
    return Table(
        f"All {plural(len(rows), 'module')}, worst first", head, tuple(rows), frozenset({1, 2, 3}), folded=True
    )


def _bits_table(placed: Mapping[tuple[int, int], Module]) -> Table:
    """One row a kind of module, with the layers of each width."""
    rows = []
    for row, kind in enumerate(_kinds(placed)):
        by_bits: dict[int, list[int]] = {}
        for (_, layer), module in sorted(item for item in placed.items() if item[0][0] == row):
            by_bits.setdefault(module.bits or 16, []).append(layer)
        text = "; ".join(f"{plural(width, 'bit')}: {_ranges(layers)}" for width, layers in sorted(by_bits.items()))
        rows.append((Cell(kind, glossary.MODULES.get(kind, "")), text))
    return Table("Bits of every kind of module, with its layers", ("Module", "Bits: layers"), tuple(rows), folded=True)


def _rest(report: Mapping[str, Any]) -> str:
    """Where bits go beside the modules."""
    head = dig(report, "weights", "lm_head_bits")
    kept = dig(report, "weights", "dtype")
    stays = f"in {kept}" if kept else "as they were"
    text = f"Every group of weights also stores its scale; token embeddings and norms stay {stays}"
    if head is not None:
        text += f", the output head has {plural(head, 'bit')}"
    per_weight = dig(report, "artifact", "bits_per_weight")
    return f"{text}. " + (
        f"Counted over the whole file that makes {per_weight:.2f} bits a weight." if is_number(per_weight) else ""
    )


def _degraded(report: Mapping[str, Any]) -> list[str]:
    names = dig(report, "weights", "degraded") or []
    if not names:
        return []
    return [f"{plural(len(names), 'module')} could only be rounded to nearest: the calibration inputs were unusable."]


def _module(entry: Mapping[str, Any]) -> Module:
    name = str(entry.get("name", ""))
    found = _LAYER.match(name)
    kind = found[2].rpartition(".")[2] if found else name
    error = entry.get("relative_error")
    return Module(
        name=name,
        layer=int(found[1]) if found else None,
        kind=kind,
        bits=entry.get("bits"),
        group_size=entry.get("group_size"),
        error=float(error) if is_number(error) else None,
        note=str(entry.get("note") or ""),
        degraded=bool(entry.get("degraded")),
    )


def _bits_colour(width: int) -> str:
    return _BITS.get(width, "cool-7")


def _ranges(numbers: Sequence[int]) -> str:
    """``0–3, 7``."""
    parts: list[list[int]] = []
    for value in numbers:
        if parts and parts[-1][1] == value - 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in parts)


def percent_short(value: float | None) -> str:
    """A small share: three digits of a per cent."""
    return percent(value) if value is None else f"{three_digits(100 * value)} %"

"""How an attention plan's file numbers layers and heads: those that are alike are written once, as ``0-3,7``."""

from collections.abc import Iterable
from typing import Any

MOST = 100_000  # layers, or heads of a layer, that a file may number


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,7``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def numbers(ranges: str) -> list[int]:
    """The inverse of `ranges`."""
    ends = [[int(n) for n in part.split("-")] for part in ranges.split(",")]
    if any(len(pair) > 2 or not 0 <= pair[0] <= pair[-1] < MOST for pair in ends):
        raise ValueError(f"{ranges} aren't ranges below {MOST}")
    return [n for pair in ends for n in range(pair[0], pair[-1] + 1)]


def spread(groups: Any) -> list[dict[str, Any]]:
    """Layers one by one from groups of layers that are alike, and heads one by one from groups of heads."""
    layers: dict[int, Any] = {}
    for group in groups:
        shape = {key: value for key, value in group.items() if key not in ("layers", "heads")}
        heads = {
            n: {k: v for k, v in own.items() if k != "heads"} for own in group["heads"] for n in numbers(own["heads"])
        }
        shape["heads"] = [heads[n] for n in range(len(heads))]
        layers |= dict.fromkeys(numbers(group["layers"]), shape)
    return [layers[n] for n in range(len(layers))]

"""Numbers and findings in words: one way of writing them on the whole page."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

CLEAR = 0.05
"""Below this p-value a difference is called clear."""

MISSING = "–"
MINUS = "−"


def dig(data: Any, *keys: str) -> Any:
    """The value under nested keys, or None where one of them is absent or null."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a report is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nbytes(value: float | None) -> str:
    """A size in decimal units with three digits: ``143 MB``, ``1.20 GB``."""
    if value is None:
        return MISSING
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{three_digits(value / size)} {unit}"
    return f"{value:.0f} bytes"


def three_digits(value: float) -> str:
    """A number with three significant digits and no exponent where it can be read without one."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return signed_text(f"{value:.2e}")
    return signed_text(f"{value:,.{max(0, 2 - magnitude)}f}")


def signed_text(text: str) -> str:
    """A number's text with a true minus sign."""
    return text.replace("-", MINUS)


def number(value: float | None, digits: int | None = None) -> str:
    """A number with so many decimals, or with three significant digits."""
    if not is_number(value):
        return MISSING
    return three_digits(value) if digits is None else signed_text(f"{value:,.{digits}f}")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent: 0.614 is ``61.4 %``."""
    return MISSING if not is_number(value) else f"{number(100 * (value or 0.0), digits)} %"


def change(value: float, digits: int = 1, unit: str = "%") -> str:
    """A change with its sign: ``+7.9 %``, ``−2.1 points``."""
    text = f"{value:+,.{digits}f}"
    return f"{signed_text(text)} {unit}" if float(text.replace(",", "")) else f"±0 {unit}"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio: ``1.88×``."""
    return MISSING if not is_number(value) else f"{number(value, digits)}×"


def seconds(value: float | None) -> str:
    """A duration: ``42 ms``, ``3.4 s``, ``4 min 10 s``."""
    if not is_number(value):
        return MISSING
    if value < 1:
        return f"{three_digits(1000 * value)} ms"
    if value < 90:
        return f"{three_digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def quantity(value: float | None, unit: str) -> str:
    """A figure with the unit that a report gives for it: bytes, seconds, or any other as it is."""
    if not is_number(value):
        return MISSING
    if unit in ("bytes", "byte", "B"):
        return nbytes(value)
    if unit in ("s", "seconds"):
        return seconds(value)
    return f"{number(value)} {unit}".strip()


def p_value(value: float | None) -> str:
    """``p < 0.001``, ``p = 0.03``."""
    if not is_number(value):
        return ""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.01 else f"p = {value:.2f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 module``, ``2,100 modules``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def sentence(text: str) -> str:
    """A clause as a sentence: with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def shortened(name: str, length: int) -> str:
    """A name that is cut in the middle when it is longer than ``length`` characters."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"

"""What the sections of a recipe are made of: their base class, and lists and pairs as a command line writes them."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Allowed:
    """The values of a key in words, where its type alone doesn't say them."""

    words: str


def listed(value: Any) -> Any:
    """Let a list be written as ``a,b`` on the command line; tuples keep a frozen model unchangeable."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def numbers(value: Any) -> Any:
    """Let a list of numbers be written as ``1,2``, or as a single number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    found = listed(value)
    if isinstance(value, str):
        return tuple(int(part) if part.isdecimal() else part for part in found)
    return found


def pair(value: Any) -> Any:
    """Let one width stand for keys and values alike."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    return numbers(value)


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a list that names something twice."""
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


class Section(BaseModel):
    """A section: frozen, typed strictly (``"3"`` is not 3), and without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Share = Annotated[float, Ge(0), Le(1)]

"""A recipe's keys in words: comments, help texts and the "allowed" part of error messages, all from the schema."""

import types
import typing
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from compress.calibrate.errors import did_you_mean
from compress.schema import SECTIONS, Allowed
from compress.yaml12 import inline


def allowed(field: FieldInfo) -> str:
    """The values of a key in words: ``2, 3, 4, 8`` or ``an integer >= 1, or null``."""
    for entry in field.metadata:
        if isinstance(entry, Allowed):
            return entry.words
    if typing.get_origin(field.annotation) is dict:
        return "a mapping of regular expressions to " + ", ".join(choices(field))
    return _in_words(field.annotation, field.metadata)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Every literal value that a key takes, also inside a list or as the value of a mapping, as it is written."""
    return tuple(str(value) for value in _literals(field.annotation))


def comment(section: str, key: str) -> str:
    """What the comment above a key says: meaning, allowed values, default."""
    field = SECTIONS[section].model_fields[key]
    default = inline(field.get_default(call_default_factory=True))
    return f"{field.description} Allowed: {allowed(field)}. Default: {default}."


def nearest(value: object, field: FieldInfo) -> str | None:
    """ "did you mean X?" for a misspelt word among a key's literal values."""
    return did_you_mean(value, choices(field)) if isinstance(value, str) else None


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in _literals(part)]


def _in_words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _in_words(parts[0], parts[1:])
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_in_words(part) for part in parts)
    if origin is Literal:
        return ", ".join(str(value) for value in parts)
    if origin is tuple:
        items = "names" if parts[0] is str else _in_words(parts[0]).replace("an integer", "integers")
        return f"a list of {items}"
    if annotation is type(None):
        return "null"
    if annotation is bool:
        return "true, false"
    words = {int: "an integer", float: "a number", str: "text"}[annotation]
    return " and".join([words, *filter(None, map(_bound, metadata))]).replace(" and", "", 1)


def _bound(constraint: Any) -> str | None:
    match constraint:
        case Ge(ge=bound):
            return f" >= {bound}"
        case Gt(gt=bound):
            return f" > {bound}"
        case Le(le=bound):
            return f" <= {bound}"
    return None

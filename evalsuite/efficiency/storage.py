"""Bytes that tensors really occupy: every storage reachable from an object, counted once.

A view counts with the whole storage behind it, since that is what stays in memory: the last 8 tokens of a key tensor,
sliced off, keep all of its tokens.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

_SEQUENCES = (list, tuple, set, frozenset, deque)
_LEAVES = (type, ModuleType, str, bytes, int, float, type(None))


@dataclass(frozen=True)
class Storage:
    """What was found in memory.

    Attributes:
        nbytes: size of all storages.
        elements: how many numbers they hold, each in the type of the tensor that it was first found by.
    """

    nbytes: int
    elements: int


def allocated(thing: Any, besides: Any = None) -> Storage:
    """The storages of all tensors in an object: a module, a cache, a nest of containers and plain objects.

    Attributes, slots, mapping values, sequences and the inner tensors of tensor subclasses are walked; classes,
    closures and tensors on the meta device are not.

    Args:
        thing: what to look into.
        besides: what it shares with this object (a cache that refers to its model) isn't counted.
    """
    found = _storages(thing)
    for key in _storages(besides) if besides is not None else ():
        found.pop(key, None)
    return Storage(sum(nbytes for nbytes, _ in found.values()), sum(nbytes // size for nbytes, size in found.values()))


def _storages(thing: Any) -> dict[tuple[str, int], tuple[int, int]]:
    """Size in bytes and bytes an element of each storage, by device and address."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for tensor in _tensors(thing):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found.setdefault((str(tensor.device), storage.data_ptr()), (storage.nbytes(), tensor.element_size()))
    return found


def _tensors(thing: Any) -> Iterator[Tensor]:
    seen: dict[int, Any] = {}  # the objects too: an id may be given to another once its object is gone
    stack = [thing]
    while stack:
        item = stack.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen[id(item)] = item
        stack += _parts(item)
        if isinstance(item, Tensor) and not hasattr(item, "__tensor_flatten__"):
            yield item


def _parts(item: Any) -> list[Any]:
    parts = list(getattr(item, "__dict__", {}).values())
    for base in type(item).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            parts.append(getattr(item, f"_{base.__name__.lstrip('_')}{name}" if private else name, None))
    if isinstance(item, Mapping):
        parts += item.values()
    elif isinstance(item, _SEQUENCES):
        parts += item
    elif isinstance(item, Tensor) and hasattr(item, "__tensor_flatten__"):  # a subclass around other tensors
        names, _ = item.__tensor_flatten__()
        parts += [getattr(item, name) for name in names]
    return parts

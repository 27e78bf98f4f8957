"""Rotary embeddings whose frequencies depend on the length, computed without keeping it.

transformers' ``dynamic`` and ``longrope`` scaling change buffers of the module while it runs: a request that is
answered at the same time, or that follows a longer one, gets the other's frequencies. Here every call works on a copy
of the module as it was made, so that a sequence gets those of its own length, as it does alone from a fresh module.
"""

import copy
from functools import cache
from typing import Any

from torch import Tensor, nn

_CHANGING = ("dynamic", "longrope")


class Stateless(nn.Module):
    """What is put before a family's class of rotary embeddings; see the module's text."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines, as the family's class gives them."""
        own = copy.copy(self)
        own._buffers = {name: None if held is None else held.clone() for name, held in self._buffers.items()}
        found: tuple[Tensor, Tensor] = super(Stateless, own).forward(*args, **kwargs)
        return found


def without_state(model: nn.Module) -> None:
    """Give every rotary embedding of a model that changes itself, and was never called, a class that doesn't."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(name in kind for kind in _listed(kinds) for name in _CHANGING) and not isinstance(module, Stateless):
            base: Any = type(module)
            module.__class__ = _stateless(base)


def _listed(kinds: Any) -> list[str]:
    """The scaling of a module, which some families have by kind of layer."""
    return [kinds] if isinstance(kinds, str) else list(kinds.values()) if isinstance(kinds, dict) else []


@cache
def _stateless(base: Any) -> Any:
    return type(base.__name__, (Stateless, base), {"__module__": __name__, "__doc__": base.__doc__})

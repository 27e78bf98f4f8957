"""A greedy search for layers that take another's attention, under a budget of perplexity.

Every layer that may take is first tried alone: it takes from the layer whose attention changes its output least, its
output projection is refitted, and perplexity is measured on windows that were held out. Then the layer that is expected
to cost least is added, again and again; before it is, it is measured among those that have been added, and takes the
place among the others that this measurement gives it. A measurement of the former round is a lower bound in practice,
so that few are needed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from compress.plan import Share
from compress.share.pairs import Candidates


@dataclass(frozen=True)
class Measured:
    """One layer, tried beside those that share already.

    Attributes:
        layer: that takes.
        source: that gives.
        shared: how many layers shared before.
        nll: mean negative log-likelihood of a held-out token.
        before: relative squared error of the layer's attention output, its own projection.
        after: with the refitted one.
        added: it was added to those that share.
    """

    layer: int
    source: int
    shared: int
    nll: float
    before: float
    after: float
    added: bool = False


@dataclass
class State:
    """How far the search is; kept after every measurement.

    Attributes:
        dense: held-out loss of the dense model.
        measured: everything that was tried, in order.
        chosen: layers that share, in the order in which they were added.
        reached: held-out loss with those that share.
        ended: why the search is over; empty while it isn't.
    """

    dense: float = math.nan
    measured: list[Measured] = field(default_factory=list)
    chosen: list[tuple[int, int]] = field(default_factory=list)
    reached: float = math.nan
    ended: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON types; figures that don't exist are null."""
        plain = asdict(self) | {"chosen": [list(pair) for pair in self.chosen]}
        return plain | {name: None if math.isnan(plain[name]) else plain[name] for name in ("dense", "reached")}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "State":
        """The inverse of :meth:`to_json`."""
        measured = [Measured(**one) for one in kept["measured"]]
        dense, reached = (math.nan if kept[name] is None else kept[name] for name in ("dense", "reached"))
        return cls(dense, measured, [(layer, source) for layer, source in kept["chosen"]], reached, kept["ended"])


class Bench(Protocol):
    """What the search measures on."""

    def dense(self) -> float:
        """Held-out loss of the dense model."""

    def nearest(self, layer: int, sources: list[int]) -> int:
        """Of some layers the one whose attention changes a layer's output least."""

    def attempt(self, layer: int, source: int, shares: Mapping[int, Share]) -> tuple[float, float, float]:
        """Held-out loss where a layer shares too, and its relative errors before and after its refit."""

    def add(self, layer: int, source: int) -> float:
        """Let a layer share from now on; held-out loss, those behind it fitted again."""

    def shares(self) -> dict[int, Share]:
        """Those that do."""


def search(bench: Bench, found: Candidates, budget: float | None, state: State, keep: Callable[[State], None]) -> State:
    """Search, or go on with it.

    Args:
        bench: in which the layers of ``state.chosen`` share.
        found: layers that may take part.
        budget: growth of perplexity that is allowed, as a share of it; None: any.
        state: where to begin.
        keep: told whenever the state has changed.

    Returns:
        The state at the end.
    """
    if math.isnan(state.dense):
        state.dense = state.reached = bench.dense()
        keep(state)
    limit = math.inf if budget is None else state.dense + math.log1p(budget)
    while not state.ended:
        best = None if len(bench.shares()) >= found.limit else _best(bench, found, state, keep)
        if best is None:
            state.ended = "limit" if len(bench.shares()) >= found.limit else "layers"
        elif best.nll > limit:
            state.ended = "budget"
        else:
            state.reached = bench.add(best.layer, best.source)
            state.chosen.append((best.layer, best.source))
            state.measured[state.measured.index(best)] = Measured(**asdict(best) | {"added": True})
        keep(state)
    return state


def _best(bench: Bench, found: Candidates, state: State, keep: Callable[[State], None]) -> Measured | None:
    """The layer that costs least beside those that share; None if there is none left."""
    shares = bench.shares()
    places = {layer: sources for layer in found.consumers if (sources := found.sources(layer, shares))}
    while places:
        expected = {layer: _expected(state, layer) for layer in places}
        layer = min(expected, key=lambda one: (expected[one][0], one))
        known = expected[layer][1]
        if known is not None and known.shared == len(shares) and known.source in places[layer]:
            return known
        source = bench.nearest(layer, places[layer])
        state.measured.append(Measured(layer, source, len(shares), *bench.attempt(layer, source, shares)))
        keep(state)
    return None


def _expected(state: State, layer: int) -> tuple[float, Measured | None]:
    """What adding a layer is expected to cost, by its last measurement; nothing where there is none."""
    last = next((one for one in reversed(state.measured) if one.layer == layer), None)
    if last is None:
        return -math.inf, None
    base = state.dense if last.shared == 0 else [one for one in state.measured if one.added][last.shared - 1].nll
    return last.nll - base, last

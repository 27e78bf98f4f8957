"""Which layers may share, and the ways to choose that measure nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from compress.calibrate.errors import InputError
from compress.model import ModelFacts
from compress.plan import AttentionPlan, Share
from compress.schema import Sharing

MODES = {"echoatt": "attn", "kvsharer": "kv"}


@dataclass(frozen=True)
class Candidates:
    """Layers that may take part.

    Attributes:
        layers: in order; all of them may give.
        kept: those of them that never take, since heads of theirs are needed as they are.
        sliding: layers with a window of the model's own, which take no part.
        limit: how many may take.
    """

    layers: tuple[int, ...]
    kept: tuple[int, ...]
    sliding: tuple[int, ...]
    limit: int

    @property
    def consumers(self) -> tuple[int, ...]:
        """Layers that may take, if an earlier one gives."""
        return tuple(layer for layer in self.layers[1:] if layer not in self.kept)

    def sources(self, consumer: int, shares: Mapping[int, Share]) -> list[int]:
        """Layers that may give to one, as others share already: no chains."""
        if consumer in shares or consumer in {share.source for share in shares.values()}:
            return []
        return [layer for layer in self.layers if layer < consumer and layer not in shares]


def candidates(facts: ModelFacts, settings: Sharing, kept: Collection[int] = ()) -> Candidates:
    """The layers of a model that may take part.

    Args:
        facts: the model.
        settings: the section.
        kept: layers whose own attention is needed.
    """
    sliding = AttentionPlan.empty(facts.config).fingerprint.sliding
    inner = range(settings.first, facts.num_layers - settings.last)
    layers = tuple(layer for layer in inner if layer not in sliding)
    limit = most(facts.num_layers, settings.ratio)
    return Candidates(layers, tuple(sorted(set(kept) & set(layers))), tuple(sliding), limit)


def most(layers: int, ratio: float) -> int:
    """Layers that a share of them is, at least one."""
    return max(1, int(round(layers * ratio, 6)))


def blocks(found: Candidates, size: int) -> dict[int, int]:
    """Runs of consecutive layers, the first of which gives to the others, by layer that takes.

    Layers that are kept as they are stand in their run without taking; the limit leaves out the last runs.
    """
    chosen: dict[int, int] = {}
    run: list[int] = []
    for layer in found.layers:
        run = [*run, layer] if run and layer == run[-1] + 1 and len(run) < size else [layer]
        if len(run) > 1 and layer not in found.kept and len(chosen) < found.limit:
            chosen[layer] = run[0]
    return chosen


def named(facts: ModelFacts, pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Pairs that the recipe names.

    Raises:
        InputError: layers that the model doesn't have, or that have windows of their own.
    """
    sliding = AttentionPlan.empty(facts.config).fingerprint.sliding
    for consumer, source in pairs:
        told = f"[{consumer}, {source}]"
        if consumer >= facts.num_layers:
            allowed = f"layers 0 to {facts.num_layers - 1}"
            raise InputError("share.pairs", told, f"the model has {facts.num_layers} layers", allowed=allowed)
        if windowed := sorted({consumer, source} & set(sliding)):
            problem = (
                f"layer {windowed[0]} has a sliding window of the model's own, and layers with different windows can't"
                " share"
            )
            raise InputError("share.pairs", told, problem, fix="leave the pair out")
    return dict(pairs)

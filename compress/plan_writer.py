"""How methods write an attention plan, and what doesn't go together; every refusal names both writers.

A part of the plan (windows, KV bits, ...) belongs to the method that wrote it first. What one method's part does to
another's is looked at in `PlanWriter.finish`, once all of a method's entries are there.
"""

from dataclasses import dataclass, replace
from typing import Any

from compress.calibrate.errors import InputError
from compress.plan import (
    AttentionPlan,
    Calibration,
    Head,
    KVBits,
    Layer,
    Packing,
    Search,
    Share,
    Source,
    Stride,
    TopK,
    Window,
    with_heads,
)

OWNERS = 2  # first layers, which never take anything from another


_NOTHING: dict[str, dict[str, Any]] = {
    "window": {"sink": 0, "window": Window(), "stride": None},
    "topk": {"topk": None},
    "kv": {"kv": None},
    "calibration": {"calibration": None},
}
"""What a head has where nobody wrote a part."""


@dataclass(frozen=True)
class Rule:
    """What a head sees, as one method decides it."""

    sink: int
    window: Window
    stride: Stride | None = None


def _told_more(head: Head, part: str) -> bool:
    """Whether somebody wrote a part for a head."""
    return replace(head, **_NOTHING[part]) != head


class PlanWriter:
    """One method at work on a plan.

    Args:
        plan: what others have written, or an empty plan.
        source: the method and what it worked from.
    """

    def __init__(self, plan: AttentionPlan, source: Source) -> None:
        self.method = source.method
        self.notes: list[str] = []
        self._plan = replace(plan, sources=(*plan.sources, source))

    def packing(self, packing: Packing) -> None:
        """How packed heads keep their tokens.

        Raises:
            InputError: another method has said so already.
        """
        self._own("kv")
        self._plan = replace(self._plan, packing=packing)

    def kv(self, layer: int, bits: KVBits, heads: tuple[int, ...] | None = None) -> None:
        """Pack the cache of some KV heads of a layer, by default all; `finish` takes back those that drop tokens.

        Raises:
            InputError: another method has written KV bits; a head that the layer doesn't have; a sliding layer.
        """
        self._own("kv")
        held = self._plan.layers[self._layer(layer)].heads
        self._change(layer, {head: replace(held[head], kv=bits) for head in self._heads(layer, heads)})

    def see(self, layer: int, head: int, rule: Rule) -> None:
        """Narrow what a KV head sees.

        Raises:
            InputError: as :meth:`kv`.
        """
        self._own("window")
        (head,) = self._heads(layer, (head,))
        held = self._plan.layers[layer].heads[head]
        changed = replace(held, sink=rule.sink, window=rule.window, stride=rule.stride)
        self._change(layer, {head: changed})

    def topk(self, layer: int, head: int, topk: TopK) -> None:
        """Let a KV head search for far tokens.

        Raises:
            InputError: as :meth:`kv`.
        """
        self._own("topk")
        (head,) = self._heads(layer, (head,))
        self._change(layer, {head: replace(self._plan.layers[layer].heads[head], topk=topk)})

    def search(self, search: Search) -> None:
        """How heads search for far tokens.

        Raises:
            InputError: another method has said so already.
        """
        self._own("topk")
        self._plan = replace(self._plan, search=search)

    def calibrate(self, layer: int, head: int, calibration: Calibration) -> None:
        """Re-weight a head's sinks (ACT).

        Raises:
            InputError: as :meth:`kv`.
        """
        self._own("calibration")
        (head,) = self._heads(layer, (head,))
        self._change(layer, {head: replace(self._plan.layers[layer].heads[head], calibration=calibration)})

    def share(self, layer: int, share: Share) -> None:
        """Let a layer take from an earlier one.

        Raises:
            InputError: a later or the same layer, a chain, one of the first layers, a map of other heads.
        """
        self._own("share")
        place = f"layer {self._layer(layer)}"
        if layer < OWNERS:
            raise self._error(f"{place} shares with another", allowed=f"layers from {OWNERS}")
        if not 0 <= share.source < layer:
            raise self._error(f"{place} shares with layer {share.source}, which isn't before it")
        if self._plan.layers[share.source].share is not None:
            raise self._error(f"{place} shares with layer {share.source}, which shares itself: a chain")
        if any(other.share is not None and other.share.source == layer for other in self._plan.layers):
            raise self._error(f"{place} shares, and another layer takes from it: a chain")
        queries = self._plan.fingerprint.heads
        if share.head_map is not None and len(share.head_map) != queries:
            raise self._error(f"{place} maps {len(share.head_map)} heads", allowed=f"{queries} query heads")
        if share.head_map is not None and any(not 0 <= head < queries for head in share.head_map):
            raise self._error(f"{place} maps heads to {sorted(set(share.head_map))}", allowed=f"0 to {queries - 1}")
        if (misfit := share.misfit(self._plan.fingerprint)) is not None:
            raise self._error(
                f"{place} has {misfit}", allowed=f"planes 0 to {self._plan.fingerprint.head_dim // 2 - 1}"
            )
        layers = list(self._plan.layers)
        layers[layer] = replace(layers[layer], share=share)
        self._plan = replace(self._plan, layers=tuple(layers))

    def score(self, scores: list[list[float]], profiled: int | None = None) -> None:
        """Keep the method's raw scores, [layers][KV heads], and the length of the longest text it looked at.

        Raises:
            InputError: not a number for every KV head.
        """
        mark = self._plan.fingerprint
        if len(scores) != mark.layers or any(len(row) != mark.kv_heads for row in scores):
            raise self._error("gives scores of another shape", allowed=f"{mark.layers} layers x {mark.kv_heads} heads")
        longest = max(profiled or 0, self._plan.max_len_profiled or 0) or None
        self._plan = replace(self._plan, scores={**self._plan.scores, self.method: scores}, max_len_profiled=longest)

    def finish(self) -> AttentionPlan:
        """The plan with what was written.

        KV heads that drop tokens don't grow with the text, and stay at 16 bits. Layers that share attention, or keys
        and values, and those that they share with, see everything at 16 bits: what a later method wrote for them is
        taken back.

        Raises:
            InputError: parts that don't go together; both writers are named.
        """
        self._unpack_dropping()
        self._clear_sharing()
        for index, layer in enumerate(self._plan.layers):
            for number, head in enumerate(layer.heads):
                self._check_head(f"layer {index}, KV head {number}", head)
            if layer.share is not None:
                self._check_share(index, layer, layer.share)
        if self._plan.packing is None and any(head.kv for layer in self._plan.layers for head in layer.heads):
            raise self._error("KV bits are given, and nobody says how tokens are packed")
        return self._plan

    def _unpack_dropping(self) -> None:
        """Whichever came first, the bits or the window."""
        count = 0
        for index, layer in enumerate(self._plan.layers):
            change = {
                number: replace(head, kv=None)
                for number, head in enumerate(layer.heads)
                if head.kv is not None and (not head.window.full or head.stride is not None)
            }
            count += len(change)
            self._change(index, change)
        if count:
            self.notes.append(f"{count} KV heads that see a window only don't grow with the text and stay at 16 bits")

    def _clear_sharing(self) -> None:
        """Of layers that share, what this method wrote."""
        shares = {index: layer.share for index, layer in enumerate(self._plan.layers) if layer.share is not None}
        taking = {index: share.source for index, share in shares.items() if share.mode != "mask"}
        told = sorted({*taking, *taking.values()})
        for part, nothing in _NOTHING.items():
            emptied = {
                index: {number: replace(head, **nothing) for number, head in enumerate(self._plan.layers[index].heads)}
                for index in told
            }
            odd = [index for index in told if tuple(emptied[index].values()) != self._plan.layers[index].heads]
            if not odd:
                continue
            if self._plan.writers.get(part) != self.method:
                problem = f"layer {odd[0]} shares attention with another one, and doesn't see everything at 16 bits"
                raise self._conflict(problem, "share", part)
            for index in odd:
                self._change(index, emptied[index])
            who = self._plan.writers.get("share", "nobody")
            self.notes.append(
                f"layers {', '.join(map(str, odd))} share attention ({who}) and stay as they are: {self.method} is "
                "taken back for them"
            )

    def _check_head(self, place: str, head: Head) -> None:
        if head.topk is not None and not head.window.full:
            raise self._conflict(f"{place}: far tokens are searched for, and the window drops them", "topk", "window")
        if head.topk is not None and head.topk.policy == "sea" and head.kv is not None:
            raise self._conflict(f"{place}: attention is estimated from all keys, and keys are packed", "topk", "kv")
        if head.calibration is not None and head.kv is not None and head.kv.scored:
            raise self._conflict(
                f"{place}: attention is re-weighted, and saliency reads the same column sums", "calibration", "kv"
            )
        if head.calibration is not None:
            other = next((part for part in ("window", "topk", "kv") if _told_more(head, part)), None)
            if other is not None:
                problem = f"{place}: attention is re-weighted over all tokens, and not all are there at 16 bits"
                raise self._conflict(problem, "calibration", other)

    def _check_share(self, index: int, layer: Layer, share: Share) -> None:
        """A layer that takes the lists of another one searches as that one does."""
        pair = (layer.heads, self._plan.layers[share.source].heads)
        if share.mode == "mask" and pair[0] != pair[1] and any(head.topk for heads in pair for head in heads):
            problem = f"layer {index} takes the lists of layer {share.source}, and doesn't search as that one does"
            raise self._conflict(problem, "share", "topk")

    def _own(self, part: str) -> None:
        """Claim a part of the plan."""
        owner = self._plan.writers.get(part, self.method)
        if owner != self.method:
            raise InputError(
                self.method,
                None,
                f"writes the part {part!r} of the attention plan, which {owner} has written",
                fix=f"leave one of {owner} and {self.method} out",
            )
        self._plan = replace(self._plan, writers={**self._plan.writers, part: self.method})

    def _layer(self, layer: int) -> int:
        """A layer's number, if it is there."""
        count = self._plan.fingerprint.layers
        if not 0 <= layer < count:
            raise self._error(f"layer {layer} isn't there", allowed=f"0 to {count - 1}")
        return layer

    def _heads(self, layer: int, heads: tuple[int, ...] | None) -> tuple[int, ...]:
        mark = self._plan.fingerprint
        if self._layer(layer) in mark.sliding:
            raise self._error(f"layer {layer} has a sliding window of its own", allowed="layers of full attention")
        chosen = tuple(range(mark.kv_heads)) if heads is None else heads
        if any(not 0 <= head < mark.kv_heads for head in chosen):
            odd = next(head for head in chosen if not 0 <= head < mark.kv_heads)
            problem = f"layer {layer}: rules belong to KV heads, not to query heads, and head {odd} isn't one"
            raise self._error(problem, allowed=f"0 to {mark.kv_heads - 1}")
        return chosen

    def _change(self, layer: int, heads: dict[int, Head]) -> None:
        layers = list(self._plan.layers)
        layers[layer] = with_heads(layers[layer], heads)
        self._plan = replace(self._plan, layers=tuple(layers))

    def _conflict(self, problem: str, one: str, other: str) -> InputError:
        writers = self._plan.writers
        first, then = writers.get(one, "nobody"), writers.get(other, "nobody")
        return InputError(
            "attention plan",
            None,
            f"{problem} ({one} by {first}, {other} by {then})",
            fix=f"leave out {first} or {then}",
        )

    def _error(self, problem: str, allowed: str | None = None) -> InputError:
        return InputError(self.method, None, problem, allowed=allowed)

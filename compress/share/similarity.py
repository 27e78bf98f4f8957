"""How alike the attention of layers is, and what it would change if one took it from another.

Between layers: the cosine of their probabilities, heads in place, as EchoAtt has it (arXiv 2409.14595). Between query
heads: the overlap ``1 - 0.5 ||P_h - P_p||_1``, and what counts in the end, the change of a head's output
``||(P_p - P_h) V_h W_o,h||_F``. Heads of another layer needn't stand in the same place: sharing without rearranging
them is known to fail (arXiv 2408.01890).

The probabilities of all layers exist for a few rows of one window at a time; of a window, queries, keys and values are
held.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.heads.rows import probabilities
from compress.tap import Seen

FIRST_ROW = 64
"""Rows before it see so few tokens that all heads are alike."""

ROWS = 64  # of a window, that heads are compared on
AT_ONCE = 1 << 24  # probabilities of all layers that exist at once
NEAREST = 3  # producer heads by overlap, among which the output decides


@dataclass(frozen=True)
class Similarity:
    """What was found, summed over windows; layers that were left out are 0 everywhere.

    Attributes:
        cosine: between layers, [L, L].
        overlap: of consumer head h of layer c with producer head q of layer p, [L, H, L, H]; 0 to 1 a window.
        change: squared change of the consumer head's output, alike.
        output: squared output of every head, [L, H].
        windows: how many were looked at.
    """

    cosine: Tensor
    overlap: Tensor
    change: Tensor
    output: Tensor
    windows: int = 0

    @classmethod
    def empty(cls, layers: int, heads: int) -> "Similarity":
        """Nothing seen yet."""
        pairs = (layers, heads, layers, heads)
        return cls(torch.zeros(layers, layers), torch.zeros(pairs), torch.zeros(pairs), torch.zeros(layers, heads))

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        found = {"cosine": self.cosine, "overlap": self.overlap, "change": self.change, "output": self.output}
        return found | {"windows": torch.tensor(self.windows)}

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "Similarity":
        """The inverse of :meth:`tensors`."""
        return cls(kept["cosine"], kept["overlap"], kept["change"], kept["output"], int(kept["windows"]))

    def cosines(self) -> Tensor:
        """Mean cosine between layers, [L, L]."""
        return self.cosine / max(1, self.windows)

    def head_map(self, consumer: int, producer: int) -> tuple[int, ...]:
        """For every query head of a layer the head of an earlier one that changes its output least.

        It is looked for among the few whose attention overlaps most.
        """
        overlap, change = self.overlap[consumer, :, producer], self.change[consumer, :, producer]
        near = overlap.topk(min(NEAREST, overlap.shape[1]), dim=1).indices
        best = near.gather(1, change.gather(1, near).argmin(1, keepdim=True))
        return tuple(best[:, 0].tolist())

    def relative_change(self, consumer: int, producer: int, head_map: tuple[int, ...] | None) -> float:
        """Squared change of a layer's head outputs with a map (None: heads in place), as a share of their squares."""
        heads = torch.arange(self.overlap.shape[1])
        other = heads if head_map is None else torch.tensor(head_map)
        change = self.change[consumer, heads, producer, other]
        return float(change.sum() / self.output[consumer].sum().clamp(min=torch.finfo(change.dtype).tiny))


def look(
    found: Similarity, seen: Mapping[int, Seen], outputs: Mapping[int, Tensor], generator: torch.Generator
) -> None:
    """Add what one window shows.

    Args:
        found: is added to, but for its number of windows.
        seen: attention of the layers that may take part, one window.
        outputs: weight of their output projections, [hidden, H * D].
        generator: of the rows that heads are compared on.

    Raises:
        ValueError: the window has no more than :data:`FIRST_ROW` tokens.
    """
    length = next(iter(seen.values())).key.shape[2]
    if length <= FIRST_ROW:
        raise ValueError(f"a window of {length} tokens, more than {FIRST_ROW} are needed")
    _layers(found, seen)
    drawn = torch.randperm(length - FIRST_ROW, generator=generator)[:ROWS].sort().values + FIRST_ROW
    grams = {layer: _grams(weight, seen[layer].query.shape[1]) for layer, weight in outputs.items()}
    heads, tokens = found.output.shape[1], len(drawn)
    before = torch.zeros_like(found.overlap)
    for rows, own in _blocks(seen, drawn):
        for layer, mine in own.items():
            earlier = {other: p for other, p in own.items() if other < layer}
            norms = _output(mine, seen[layer].value, mine[:0], grams[layer])
            found.output[layer] += norms[0]
            if not earlier:
                continue
            theirs = torch.cat(list(earlier.values()))  # [earlier heads, r, n]
            apart = torch.cdist(mine.flatten(1), theirs.flatten(1), p=1)
            change = _output(mine, seen[layer].value, theirs, grams[layer])[1:]
            for index, other in enumerate(earlier):
                place = slice(index * heads, (index + 1) * heads)
                before[layer, :, other] += len(rows) - 0.5 * apart[:, place]
                found.change[layer, :, other] += change[place].t()
    found.overlap.add_(before / tokens)


def _layers(found: Similarity, seen: Mapping[int, Seen]) -> None:
    """Add the cosines of all rows' probabilities."""
    layers = list(seen)
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    length = seen[layers[0]].key.shape[2]
    for _, own in _blocks(seen, torch.arange(length)):
        flat = torch.stack([p.flatten() for p in own.values()])
        total += (flat @ flat.t()).double()
    norm = total.diagonal().sqrt()
    place = torch.tensor(layers)
    found.cosine[place[:, None], place] += (total / (norm[:, None] * norm)).float()


def _blocks(seen: Mapping[int, Seen], rows: Tensor) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Rows, few at a time, with every layer's probabilities [H, r, n] of them."""
    some = next(iter(seen.values()))
    size = max(1, AT_ONCE // (len(seen) * some.query.shape[1] * some.key.shape[2]))
    for block in rows.split(size):
        yield block, {layer: torch.cat([p for _, p in _same(one, block)], 1).cpu() for layer, one in seen.items()}


def _same(seen: Seen, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As ``probabilities``, all over as many keys."""
    last = int(rows[-1]) + 1
    for own, p in probabilities(seen, rows):
        yield own, torch.nn.functional.pad(p, (0, last - p.shape[2]))


def _grams(weight: Tensor, heads: int) -> Tensor:
    """``W_o,h^T W_o,h`` of every head, [H, D, D], so that norms of outputs need no hidden states."""
    parts = weight.detach().float().cpu().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, D]
    return parts.transpose(1, 2) @ parts


def _output(mine: Tensor, value: Tensor, theirs: Tensor, grams: Tensor) -> Tensor:
    """Squared outputs of a layer's heads, and their squared changes with other probabilities.

    Args:
        mine: [H, r, n].
        value: the layer's, [1, Hkv, T, D].
        theirs: [Q, r, n].
        grams: [H, D, D].

    Returns:
        [1 + Q, H].
    """
    heads, _, keys = mine.shape
    values = value[0, :, :keys].float().cpu()
    group = heads // len(values)
    own = (mine.unflatten(0, (-1, group)) @ values[:, None]).flatten(0, 1)  # [H, r, D]
    flat = values.transpose(0, 1).flatten(1)  # [n, Hkv * D]
    others = (theirs.flatten(0, 1) @ flat).unflatten(0, theirs.shape[:2]).unflatten(2, (len(values), -1))
    found = [((own @ grams) * own).sum((1, 2))]
    for one in others:  # [r, Hkv, D]
        apart = one.transpose(0, 1).repeat_interleave(group, 0) - own
        found.append(((apart @ grams) * apart).sum((1, 2)))
    return torch.stack(found)

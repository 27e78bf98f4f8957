"""Stream-K: who works on which tiles of keys, so that every program has equally many however long the heads are."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One list of equal tiles, cluster by cluster, sequence by sequence, head by head, in equal runs.

    A head of a sequence is an item, numbered in the order of the list. The piece of item i that program p works on is
    number ``p + i``: from one piece to the next in the list at least one of them grows, so that no two share a number.

    Attributes:
        batch: sequences.
        heads: of every cluster.
        tiles: of a head of every cluster.
        share: tiles a program.
    """

    batch: int
    heads: tuple[int, ...]
    tiles: tuple[int, ...]
    share: int

    @property
    def begins(self) -> tuple[int, ...]:
        """The first tile of every cluster, and the number of all tiles."""
        sizes = [self.batch * heads * tiles for heads, tiles in zip(self.heads, self.tiles, strict=True)]
        return tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))

    @property
    def programs(self) -> int:
        """How many programs have work."""
        return -(-self.begins[-1] // self.share)

    @property
    def pieces(self) -> int:
        """One more than the largest number of a piece."""
        return self.programs + self.batch * sum(self.heads)

    def loads(self) -> list[int]:
        """Tiles of every program."""
        total = self.begins[-1]
        return [min(self.share, total - first) for first in range(0, total, self.share)]


def plan(batch: int, heads: Sequence[int], lengths: Sequence[int], tile: int, programs: int) -> Schedule:
    """The schedule for clusters of ``heads`` KV heads and ``lengths`` slots, ``tile`` slots at a time.

    Args:
        batch: sequences.
        heads: KV heads of every cluster.
        lengths: the most slots that a head of every cluster has.
        tile: slots a tile.
        programs: how many the GPU runs at once.
    """
    tiles = tuple(-(-length // tile) for length in lengths)
    total = batch * sum(count * own for count, own in zip(heads, tiles, strict=True))
    return Schedule(batch, tuple(heads), tiles, max(1, -(-total // programs)))

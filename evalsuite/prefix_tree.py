"""Sequences that begin alike, laid out so that what they share is computed once.

The choices of a question share the question, and questions share their few-shot examples. Sequences are sorted, and
in a *row* each is written without what it has in common with the one before it; an attention mask gives every token its
own past. A row is one forward pass. Where many rows share a long beginning, it is run once and its keys and values
serve all of them.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

ROW_TOKENS = 512
"""A row is closed at the first new question behind so many tokens: larger matrices would no longer save time."""

_MIN_PREFIX = 64
"""A shorter common beginning isn't worth a forward pass of its own."""


@dataclass(frozen=True)
class Continuation:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: context and continuation.
        scored: how many tokens at the end are the continuation; at least one, and fewer than there are.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens to predict."""
        return self.tokens[-self.scored :]

    @property
    def context(self) -> int:
        """Tokens of context."""
        return len(self.tokens) - self.scored


@dataclass(frozen=True)
class Row:
    """Sequences in one row of tokens.

    Attributes:
        members: number of each sequence among all.
        tokens: the row, of length T.
        positions: each token's position in the sequences that it belongs to.
        paths: of each member, the places of its inputs in the row, in order, without the shared prefix.
        starts: of each member, the place where its own tokens begin.
    """

    members: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def branches(self) -> bool:
        """Whether the row is anything but one plain sequence."""
        return any(position != self.positions[0] + place for place, position in enumerate(self.positions))

    def mask(self, prefix: int, window: int | None) -> torch.Tensor:
        """Which token attends to which: boolean, ``[T, prefix + T]``.

        Args:
            prefix: tokens of the shared prefix, which stand before the row.
            window: a token sees only so many, itself among them; None for all.
        """
        length = len(self.tokens)
        seen = torch.zeros(length, prefix + length, dtype=torch.bool)
        seen[:, :prefix] = True
        ends = (*self.starts[1:], length)
        for path, start, end in zip(self.paths, self.starts, ends, strict=True):
            seen[start:end, [prefix + place for place in path[: len(path) - (end - start)]]] = True
            seen[start:end, prefix + start : prefix + end] = torch.ones(end - start, end - start).tril().bool()
        if window is not None:
            position = torch.tensor(self.positions)
            before = torch.cat([torch.arange(prefix), position])
            seen &= position[:, None] - before[None, :] < window
        return seen


@dataclass(frozen=True)
class Family:
    """Rows that begin alike.

    Attributes:
        prefix: tokens before every row; may be empty.
        rows: the rows, made as they are asked for.
    """

    prefix: tuple[int, ...]
    rows: Iterator[Row]


def plan_rows(items: Sequence[Continuation], questions: int) -> Iterator[Family]:
    """Lay out sequences in rows.

    Args:
        items: the sequences.
        questions: at most so many different contexts in a row.

    Yields:
        Families; each sequence is a member of exactly one row.
    """
    order = sorted(range(len(items)), key=lambda index: items[index].tokens)
    return _Plan(items, order, questions).families()


def probe(items: Sequence[Continuation]) -> tuple[list[Continuation], Family]:
    """Two sequences as long as the longest, in one row behind a prefix: every mechanism of this module at once.

    The second is the longest itself; the first begins like it and ends with the same tokens backwards. The second half
    of each is scored.
    """
    tokens = max((item.tokens for item in items), key=len)
    half = (len(tokens) + 1) // 2
    other = (*tokens[:half], *reversed(tokens[half:]))
    pair = [Continuation(other, len(tokens) - half), Continuation(tokens, len(tokens) - half)]
    return pair, _Plan(pair, [0, 1], 2).family(0, 2, half // 2)


class _Plan:
    """Sorted sequences, and where they are cut.

    Args:
        items: the sequences.
        order: the numbers of those to lay out, sorted by tokens.
        questions: at most so many different contexts in a row.
    """

    def __init__(self, items: Sequence[Continuation], order: Sequence[int], questions: int) -> None:
        self.items, self.order, self.questions = items, order, questions
        # Of each place in the order: tokens in common with the one before.
        inputs = [items[index].inputs for index in order]
        self.common = [0, *(_common(left, right) for left, right in pairwise(inputs))]

    def families(self) -> Iterator[Family]:
        """All of them; sequences without a prefix worth having are in the same family."""
        count = len(self.order)
        related, plain = 0, 0  # where the present run began, and the present stretch without a prefix
        for place in range(1, count + 1):
            if place < count and self._related(place):
                continue
            prefix = self._prefix(related, place)
            if prefix:
                if plain < related:
                    yield self.family(plain, related, 0)
                yield self.family(related, place, prefix)
                plain = place
            related = place
        if plain < count:
            yield self.family(plain, count, 0)

    def family(self, start: int, stop: int, prefix: int) -> Family:
        """The rows of a range, behind so many tokens of prefix."""
        rows = (_row(self.items, self.order[a:b], self.common[a:b], prefix) for a, b in self._cuts(start, stop, prefix))
        return Family(self._item(start).tokens[:prefix], rows)

    def _item(self, place: int) -> Continuation:
        return self.items[self.order[place]]

    def _new_question(self, place: int) -> bool:
        context = self._item(place).context
        return context != self._item(place - 1).context or self.common[place] < context

    def _related(self, place: int) -> bool:
        """Whether a sequence may have its prefix in common with the one before it."""
        common = self.common[place]
        longer = max(self._item(place).context, self._item(place - 1).context)
        # A question with a long text of its own isn't to lose that for a short beginning which all have.
        return not self._new_question(place) or (common >= _MIN_PREFIX and 4 * common >= longer)

    def _prefix(self, start: int, stop: int) -> int:
        """Tokens of prefix that are worth a forward pass of their own."""
        contexts = (self._item(place).context - 1 for place in range(start, stop))  # the last predicts, so it must run
        shared = min([*self.common[start + 1 : stop], *contexts])
        if shared < _MIN_PREFIX:
            return 0
        several = next(self._cuts(start, stop, 0))[1] < stop
        return shared if several or shared > 2 * ROW_TOKENS else 0

    def _cuts(self, start: int, stop: int, prefix: int) -> Iterator[tuple[int, int]]:
        """Ranges of places that make a row."""
        first, length, questions = start, len(self._item(start).inputs) - prefix, 1
        for place in range(start + 1, stop):
            size, common = len(self._item(place).inputs) - prefix, self.common[place] - prefix
            new = self._new_question(place)
            full = length >= ROW_TOKENS and (new or 2 * common < size)
            if full or (new and questions == self.questions) or length > 4 * max(ROW_TOKENS, size):
                yield first, place
                first, length, questions = place, size, 1
            else:
                length, questions = length + size - common, questions + new
        yield first, stop


def _row(items: Sequence[Continuation], members: Sequence[int], common: Sequence[int], prefix: int) -> Row:
    """One row of neighbours; ``common`` is what each has in common with the one before it."""
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[tuple[int, ...]] = []
    starts: list[int] = []
    for number, (member, alike) in enumerate(zip(members, common, strict=True)):
        inputs = items[member].inputs
        shared = max(alike - prefix, 0) if number else 0
        own = inputs[prefix + shared :]
        start = len(tokens)
        starts.append(start)
        paths.append((*(paths[-1][:shared] if number else ()), *range(start, start + len(own))))
        tokens += own
        positions += range(prefix + shared, len(inputs))
    return Row(tuple(members), tuple(tokens), tuple(positions), tuple(paths), tuple(starts))


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    # Slices are compared in C, which is why a search by halves beats a loop over tokens.
    return bisect_left(range(min(len(left), len(right))), True, key=lambda n: left[: n + 1] != right[: n + 1])

"""Needles in a haystack: one or several facts in a long text, and a question about them.

A haystack comes in as its words; one that is too short is repeated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from compress.evalsuite.longcontext.vocabulary import NOISE, identifier, number, pairs

Draw = Callable[[Random], str]


@dataclass(frozen=True)
class Question:
    """A prompt that can be made longer.

    Attributes:
        prompt: the text with so much filler (words, lines, ... as the task has it); more filler, more tokens.
        answers: what has to be found in the answer.
        least: filler without which the question makes no sense.
    """

    prompt: Callable[[int], str]
    answers: tuple[str, ...]
    least: int = 0


@dataclass(frozen=True)
class Needles:
    """Facts ``(key, value)`` of one kind, some of which are asked for.

    Attributes:
        kind: what the value is called in the prompt.
        facts: all that are hidden, those asked for and those that distract.
        asked: keys of the question.
    """

    kind: str
    facts: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]

    def lines(self) -> list[str]:
        """A sentence for each fact."""
        return [f"The secret {self.kind} of {key} is {value}." for key, value in self.facts]

    def answers(self) -> tuple[str, ...]:
        """The values asked for."""
        return tuple(value for key, value in self.facts if key in self.asked)

    def frame(self, haystack: str) -> str:
        """The whole prompt around a haystack."""
        several = len(self.answers()) > 1
        kind, verb = (f"{self.kind}s", "are") if several else (self.kind, "is")
        keys = " and ".join(filter(None, [", ".join(self.asked[:-1]), self.asked[-1]]))
        return (
            f"The text below hides some secret {self.kind}s. Keep them in mind: a question about them follows.\n\n"
            f"{haystack}\n\n"
            f"Question: What {verb} the secret {kind} of {keys} in the text above?\n"
            f"Answer: The secret {kind} of {keys} {verb}"
        )


def passkey(draw: Random, depth: float) -> Question:
    """A five-digit key in text that says nothing."""
    key = number(draw, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def prompt(count: int) -> str:
        text = _bury(_filler(NOISE.split(), count), [(depth, needle)])
        return (
            "An important fact is hidden in a lot of irrelevant text. Find it and memorize it.\n\n"
            f"{text}\n\n"
            # Without "Question" and "Answer" a needle right before it is read as talk about what a pass key is.
            "Question: What is the pass key in the text above?\nAnswer: The pass key is"
        )

    return Question(prompt, (key,))


def single(draw: Random, depth: float, haystack: Sequence[str], value: Draw = number, kind: str = "number") -> Question:
    """``niah_single``: one needle."""
    (key,) = pairs(draw, 1)
    return _in_text(Needles(kind, ((key, value(draw)),), (key,)), [depth], haystack)


def multikey(draw: Random, depth: float, haystack: Sequence[str]) -> Question:
    """``niah_multikey_1``: the needle asked for, at the depth, and three others."""
    keys = pairs(draw, 4)
    needles = Needles("number", tuple((key, number(draw)) for key in keys), (keys[0],))
    return _in_text(needles, [depth, *(draw.random() for _ in keys[1:])], haystack)


def multivalue(draw: Random, haystack: Sequence[str]) -> Question:
    """``niah_multivalue``: four values of one key."""
    (key,) = pairs(draw, 1)
    needles = Needles("number", tuple((key, number(draw)) for _ in range(4)), (key,))
    return _in_text(needles, [draw.random() for _ in range(4)], haystack)


def multiquery(draw: Random, haystack: Sequence[str]) -> Question:
    """``niah_multiquery``: four keys, all asked for."""
    keys = pairs(draw, 4)
    needles = Needles("number", tuple((key, number(draw)) for key in keys), tuple(keys))
    return _in_text(needles, [draw.random() for _ in keys], haystack)


def needles_only(draw: Random, depth: float, value: Draw = number, kind: str = "number") -> Question:
    """``niah_multikey_2`` and ``_3``: a haystack made of needles; with UUIDs, keys are UUIDs too."""
    seed = draw.getrandbits(64)

    def key(count: int) -> list[str]:
        again = Random(seed)
        return [identifier(again) for _ in range(count)] if kind == "UUID" else pairs(again, count)

    asked, secret = key(1)[0], value(draw)

    def prompt(count: int) -> str:
        again = Random(seed + 1)
        others = [(name, value(again)) for name in key(count + 1)[1:] if name != asked]
        place = round(depth * len(others))
        facts = (*others[:place], (asked, secret), *others[place:])
        needles = Needles(kind, facts, (asked,))
        return needles.frame(" ".join(needles.lines()))

    return Question(prompt, (secret,))


def line_retrieval(draw: Random, depth: float) -> Question:
    """LongEval's lines: a register of names and contents, one of which is asked for."""
    seed, content = draw.getrandbits(64), number(draw, 5)
    (asked,) = pairs(Random(seed), 1)

    def prompt(count: int) -> str:
        again = Random(seed + 1)
        rows = [(name, number(again, 5)) for name in pairs(Random(seed + 2), count) if name != asked]
        rows.insert(round(depth * len(rows)), (asked, content))
        lines = "\n".join(f"line {name}: REGISTER_CONTENT is <{value}>" for name, value in rows)
        return (
            f"Below is a register of lines. Remember what each line holds.\n\n{lines}\n\n"
            f"What is the REGISTER_CONTENT of line {asked}? The REGISTER_CONTENT of line {asked} is <"
        )

    return Question(prompt, (content,))


def _in_text(needles: Needles, depths: Sequence[float], haystack: Sequence[str]) -> Question:
    places = list(zip(depths, needles.lines(), strict=True))
    return Question(lambda count: needles.frame(_bury(_filler(haystack, count), places)), needles.answers())


def _filler(text: Sequence[str], count: int) -> list[str]:
    """So many words of a text, from its beginning, and again from there where it ends."""
    return list(islice(cycle(text), count))


def _bury(filler: list[str], needles: Sequence[tuple[float, str]]) -> str:
    """The filler with every needle at its depth, moved on to the end of a sentence where one ends soon."""
    places = sorted((_sentence_end(filler, round(depth * len(filler))), needle) for depth, needle in needles)
    pieces, start = [], 0
    for place, needle in places:
        pieces += [*filler[start:place], needle]
        start = place
    return " ".join([*pieces, *filler[start:]])


def _sentence_end(filler: list[str], place: int) -> int:
    if place == 0:
        return 0
    near = range(place, min(place + max(2, len(filler) // 50), len(filler)))
    return next((index for index in near if filler[index - 1].endswith((".", "!", "?"))), place)

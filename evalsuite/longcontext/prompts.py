"""From a question that can be made longer to a prompt of the length asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from compress.calibrate.errors import InputError
from compress.evalsuite.longcontext import aggregation, needles
from compress.evalsuite.longcontext.needles import Question
from compress.evalsuite.longcontext.settings import LongContextSettings
from compress.evalsuite.longcontext.vocabulary import NOISE, identifier

DENSEST = 4
"""So many units of filler a token end the search for a size, whatever the tokenizer makes of them."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: its name.
        length: tokens that were asked for, answer included.
        depth: place of the needle as a fraction of the haystack; None where the answer is spread.
        prompt: the text.
        answers: what the answer has to hold.
        room: tokens for the answer.
    """

    task: str
    length: int
    depth: float | None
    prompt: str
    answers: tuple[str, ...]
    room: int


Maker = Callable[[Random, float, Sequence[str], int], Question]
"""Makes a question: what to draw from, depth, words of the haystack, length in tokens."""

PLACED: dict[str, Maker] = {
    "passkey": lambda draw, depth, _text, _length: needles.passkey(draw, depth),
    "niah_single_1": lambda draw, depth, _text, _length: needles.single(draw, depth, NOISE.split()),
    "niah_single_2": lambda draw, depth, text, _length: needles.single(draw, depth, text),
    "niah_single_3": lambda draw, depth, text, _length: needles.single(draw, depth, text, identifier, "UUID"),
    "niah_multikey_1": lambda draw, depth, text, _length: needles.multikey(draw, depth, text),
    "niah_multikey_2": lambda draw, depth, _text, _length: needles.needles_only(draw, depth),
    "niah_multikey_3": lambda draw, depth, _text, _length: needles.needles_only(draw, depth, identifier, "UUID"),
    "line_retrieval": lambda draw, depth, _text, _length: needles.line_retrieval(draw, depth),
}
"""Tasks with one needle, which has a depth."""

SPREAD: dict[str, Maker] = {
    "niah_multivalue": lambda draw, _depth, text, _length: needles.multivalue(draw, text),
    "niah_multiquery": lambda draw, _depth, text, _length: needles.multiquery(draw, text),
    "ruler_vt": lambda draw, _depth, _text, _length: aggregation.variable_tracking(draw),
    "ruler_cwe": lambda draw, _depth, _text, length: aggregation.common_words(draw, length),
    "ruler_fwe": lambda draw, _depth, _text, _length: aggregation.frequent_words(draw),
}
"""Tasks whose answer is in several places."""


def make_items(
    task: str, tokenizer: Any, settings: LongContextSettings, haystack: Sequence[str] | None = None
) -> list[Item]:
    """Every question of one task: lengths x depths x samples, also where the task has no depth.

    A prompt and its answer take at most ``length`` tokens, and one unit of filler more (a word; a needle in
    ``niah_multikey_2`` and ``_3``; a line) would be too much.

    Args:
        task: its name.
        tokenizer: sizes the prompts.
        settings: the grid.
        haystack: words around the needles; None, or none, is RULER's repeated sentences.

    Raises:
        InputError: a length is too short for the task.
    """
    words = haystack or NOISE.split()
    make = PLACED.get(task) or SPREAD[task]
    found = []
    for length in settings.lengths:
        drawn = [
            (depth, make(_draw(settings, task, depth, sample), depth, words, length))
            for depth in settings.places()
            for sample in range(settings.samples)
        ]
        shortest = max(_tokens(question, question.least, tokenizer) for _, question in drawn)
        if shortest > length:
            raise InputError("eval.lengths", length, f"is too short for {task}", allowed=f"{shortest} or more")
        for depth, question in drawn:
            prompt, room = _fit(question, tokenizer, length), _room(question, tokenizer)
            found.append(Item(task, length, depth if task in PLACED else None, prompt, question.answers, room))
    return found


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as the model reads it, with the tokens that its tokenizer puts before a text but none that ends it."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _draw(settings: LongContextSettings, task: str, depth: float, sample: int) -> Random:
    """The same keys and values at every length, so that only the length differs."""
    return Random(f"{settings.seed}/{task}/{depth:.6f}/{sample}")


def _fit(question: Question, tokenizer: Any, length: int) -> str:
    """The longest prompt that leaves room for its answer: steps that double, then bisection."""
    low, step = question.least, 1
    while step < DENSEST * length and _tokens(question, low + step, tokenizer) <= length:
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if _tokens(question, middle, tokenizer) <= length:
            low = middle
        else:
            high = middle
    return question.prompt(low)


def _tokens(question: Question, filler: int, tokenizer: Any) -> int:
    """Of a prompt with so much filler, and its answer."""
    return len(token_ids(tokenizer, question.prompt(filler))) + _room(question, tokenizer)


def _room(question: Question, tokenizer: Any) -> int:
    """Tokens for an answer: a quarter more than the expected strings take, and a few for words around them."""
    return len(token_ids(tokenizer, ", ".join(question.answers))) * 5 // 4 + 8

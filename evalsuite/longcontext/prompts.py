"""From a question that can be made longer to a prompt of the length asked for."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import platformdirs
from compress.calibrate.errors import InputError
from compress.evalsuite.longcontext import aggregation, needles
from compress.evalsuite.longcontext.needles import Question
from compress.evalsuite.longcontext.settings import LongContextSettings
from compress.evalsuite.longcontext.vocabulary import NOISE, identifier

VERSION = 1
"""Of the generator: prompts of another version are made anew."""


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


Maker = Callable[[Random, float, str, int], Question]

PLACED: dict[str, Maker] = {
    "passkey": lambda draw, depth, _text, _length: needles.passkey(draw, depth),
    "niah_single_1": lambda draw, depth, _text, _length: needles.single(draw, depth, NOISE),
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


def make_items(task: str, tokenizer: Any, settings: LongContextSettings, haystack: str | None) -> list[Item]:
    """Every question of one task: lengths x depths x samples, also where the task has no depth.

    Args:
        task: its name.
        tokenizer: sizes the prompts.
        settings: the grid.
        haystack: text around the needles; None, or a text without words, is RULER's repeated sentences.

    Raises:
        InputError: a length is too short for the task.
    """
    text = haystack if haystack and haystack.strip() else NOISE
    found = []
    for length in settings.lengths:
        drawn = [
            (depth, (PLACED.get(task) or SPREAD[task])(_draw(settings, task, depth, sample), depth, text, length))
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


def _draw(settings: LongContextSettings, task: str, depth: float, sample: int) -> Random:
    """The same keys and values at every length, so that only the length differs."""
    return Random(f"{settings.seed}/{task}/{depth:.6f}/{sample}")


def _fit(question: Question, tokenizer: Any, length: int) -> str:
    """The longest prompt that leaves room for its answer, found by bisection."""
    low, high = question.least, max(question.least, length // question.densest) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _tokens(question, middle, tokenizer) <= length:
            low = middle
        else:
            high = middle
    return question.prompt(low)


def _tokens(question: Question, filler: int, tokenizer: Any) -> int:
    """Of a prompt with so much filler, and its answer."""
    return len(_ids(tokenizer, question.prompt(filler))) + _room(question, tokenizer)


def _room(question: Question, tokenizer: Any) -> int:
    """Tokens for an answer: a quarter more than the expected strings take, and a few for words around them."""
    return len(_ids(tokenizer, ", ".join(question.answers))) * 5 // 4 + 8


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def default_cache_dir() -> Path:
    """Where prompts are kept unless told otherwise: the user's cache folder of this system."""
    return Path(platformdirs.user_cache_dir("compress"), "long-context")


def cached_items(
    task: str,
    tokenizer: Any,
    settings: LongContextSettings,
    haystack: str | None,
    cache_dir: Path | None = None,
) -> list[Item]:
    """:func:`make_items`, kept on disk for a tokenizer, task, grid, seed and haystack.

    A folder that can't be written to, or a damaged file, costs time, nothing else.
    """
    facts = {
        "version": VERSION,
        "task": task,
        "settings": asdict(settings),
        "haystack": hashlib.sha256((haystack or "").encode()).hexdigest(),
        "vocabulary": tokenizer.get_vocab(),
        "ids": _ids(tokenizer, NOISE),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = (cache_dir or default_cache_dir()) / f"{key}.json"
    kept = _load(path)
    if kept is None:
        kept = make_items(task, tokenizer, settings, haystack)
        _store(path, kept)
    return kept


def _load(path: Path) -> list[Item] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(kept["items"])
        if hashlib.sha256(text.encode()).hexdigest() != kept["digest"]:
            return None
        return [Item(**item | {"answers": tuple(item["answers"])}) for item in kept["items"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, items: list[Item]) -> None:
    rows = [asdict(item) for item in items]
    text = json.dumps({"digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(), "items": rows})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)

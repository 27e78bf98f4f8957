"""A model's answers to long prompts, decoded greedily with its cache at work, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compress.calibrate.workers import Workers
from compress.evalsuite.head import CacheFactory, evaluating
from compress.evalsuite.longcontext.prompts import token_ids
from compress.evalsuite.longcontext.settings import LongContextSettings, check_long_context
from compress.evalsuite.longcontext.store import prepare
from compress.evalsuite.sliding import context_of
from compress.evalsuite.statistics import mean_and_error
from transformers import Cache

CHUNK = 4096
"""Tokens of a prompt that go through the model at once."""

QUESTION = 64
"""Tokens at the end of a prompt that come through a caller's cache: what is given at once sees the text as it was."""


@dataclass(frozen=True)
class Answer:
    """What was expected, what the model said, and the share of what was expected that is in it."""

    expected: tuple[str, ...]
    given: str
    score: float


@dataclass(frozen=True)
class Cell:
    """The questions of one task, length and depth.

    Attributes:
        task: its name.
        length: tokens of a prompt with its answer.
        depth: place of the needle as a fraction; None where the answer is spread over the prompt.
        score: mean over the questions, 0 to 1.
        n: number of questions.
        answers: each of them.
    """

    task: str
    length: int
    depth: float | None
    score: float
    n: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Result:
    """One task at one length, over all depths.

    Attributes:
        task: its name.
        length: tokens of a prompt with its answer.
        score: mean over the questions, 0 to 1.
        stderr: standard error of the mean; None for a single question.
        scores: of each question, in the order in which they are asked.
    """

    task: str
    length: int
    score: float
    stderr: float | None
    scores: tuple[float, ...]


def long_context(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: LongContextSettings,
    haystack: str | None = None,
    cache: CacheFactory | None = None,
) -> list[Cell]:
    """Ask a model.

    Args:
        model: a transformers causal language model; it is left as it was.
        tokenizer: its tokenizer.
        tasks: names out of ``TASKS``.
        settings: the grid of prompts.
        haystack: text around the needles; None is RULER's repeated sentences. Tasks that have a haystack of their own
            don't use it.
        cache: makes a fresh cache for a prompt; by default the model makes its own.

    Returns:
        A cell for every task, length and depth, in this order.

    Raises:
        InputError: as :func:`check_long_context`; a length that is too short for a task.
    """
    tasks = list(dict.fromkeys(tasks))
    check_long_context(tasks, settings, context_of(model.config))
    items = prepare(tasks, tokenizer, settings, haystack)
    ends = _ends(model, tokenizer)
    # Threads only run the model: neither tokenizers nor the caller's factory need be safe in several at once.
    questions = ((token_ids(tokenizer, item.prompt), item.room, None if cache is None else cache()) for item in items)
    cells: dict[tuple[str, int, float | None], list[Answer]] = {}
    with evaluating(model), Workers(None if model.device.type == "cpu" else 1) as workers:
        said = workers.map(lambda question: _answer(model, *question, ends), questions)
        for item, tokens in zip(items, said, strict=True):
            given = tokenizer.decode(tokens, skip_special_tokens=True)
            answer = Answer(item.answers, given, string_match_all(given, item.answers))
            cells.setdefault((item.task, item.length, item.depth), []).append(answer)
    return [
        Cell(*key, mean_and_error([answer.score for answer in found])[0], len(found), tuple(found))
        for key, found in cells.items()
    ]


def results(cells: Sequence[Cell]) -> list[Result]:
    """Scores by task and length, with their standard errors."""
    found: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.length), []).extend(answer.score for answer in cell.answers)
    return [Result(*key, *mean_and_error(scores), tuple(scores)) for key, scores in found.items()]


def grid(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as a report keeps them."""
    return [
        {"task": cell.task, "length": cell.length, "depth": cell.depth, "score": cell.score, "n": cell.n}
        for cell in cells
    ]


def string_match_all(given: str, expected: Sequence[str]) -> float:
    """RULER's score: the share of the expected strings that are in the answer, whatever their case."""
    return sum(part.lower() in given.lower() for part in expected) / len(expected)


def _answer(model: Any, prompt: list[int], room: int, past: Cache | None, ends: set[int]) -> list[int]:
    """The likeliest token, again and again, until the answer is long enough or the model ends it."""
    ids = torch.tensor([prompt], device=model.device)
    text = ids.shape[1] if past is None else max(0, ids.shape[1] - QUESTION)
    for part in [part for side in (ids[:, :text], ids[:, text:]) for part in side.split(CHUNK, dim=1) if part.numel()]:
        found = model(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = found.past_key_values
    said: list[int] = []
    while len(said) < room:
        likeliest = int(found.logits[0, -1].argmax())
        if likeliest in ends:
            break
        said.append(likeliest)
        if len(said) < room:
            fed = torch.tensor([[likeliest]], device=model.device)
            found = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = found.past_key_values
    return said


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends])
    return {end for end in (*found, tokenizer.eos_token_id) if end is not None}

"""Long prompts whose answer lies far behind: what heads are profiled on.

Two kinds. *Passkey*: word lists hidden in long text and asked for at its end, as in DuoAttention (arXiv 2410.10819,
section 2.3). *Answered*: a document and a request about all of it, answered by the model itself, as in MoA (arXiv
2406.14909, section 4), whose profiles on plain text or on people's answers are worse. Wording and order are ours.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from compress.calibrate.decoding import cache_for
from compress.calibrate.errors import InputError
from compress.calibrate.text import PYDOC, open_text
from compress.evalsuite.head import evaluating
from compress.evalsuite.longcontext.prompts import token_ids
from compress.generation.completion import end_tokens

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
NATO = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
    "romeo sierra tango uniform victor whiskey xray yankee zulu"
)
BLOCK = 16
"""Items are a multiple of so many tokens long."""

REQUESTS = (
    "Summarise the text above from its beginning to its end.",
    "List the main points of the text above in the order in which they come, and what is said about each.",
    "What does the first part of the text above say, and how does its last part go on from there?",
)
INTRODUCTION = (
    "The text below hides some pass phrases. Remember each of them: questions about them follow at its end.\n\n"
)
END = "\n\nThat is the end of the text.\n\n"
CHUNK = 4096
"""Tokens of a prompt that go through the model at once."""

LEAST_WORDS = 2
CODE_FILES = 60  # about 1.5 MB of source
CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Asked:
    """One needle: where its words stand, and where they are asked for; equal tokens in both places.

    Attributes:
        question: position of the question's first token.
        answer: first position of the words in the answer, and the one behind them.
        needle: the same of the words in the text.
    """

    question: int
    answer: tuple[int, int]
    needle: tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One prompt with its answers.

    Attributes:
        ids: tokens ``[T]``, int64.
        supervised: positions *at which* the model predicts a token of an answer ``[T]`` bool: where position t is
            supervised, ``ids[t + 1]`` belongs to an answer. Hidden states and logits are judged there.
        kind: "passkey" or "answered".
        context: tokens before the first question. DuoAttention's code judges the states of all positions from here on.
        asked: the needles in the order of the questions; empty for "answered".
    """

    ids: Tensor
    supervised: Tensor
    kind: str
    context: int
    asked: tuple[Asked, ...] = ()


def passkey_items(
    tokenizer: Any,
    lengths: Sequence[int],
    seed: int = 0,
    haystacks: Sequence[str] | None = None,
    words: int = 32,
    needles: int = len(ORDINALS),
) -> list[Item]:
    """Pass phrases in long text, and questions about all of them.

    Ten phrases, named by ordinals, stand between blank lines at random depths; the questions follow in random order.
    The text begins anywhere in a haystack; haystacks take turns. An item is as long as asked for, rounded down to a
    multiple of 16 tokens. Where phrases and questions would take more than half of it, there are fewer phrases, and
    where a single one would, it has fewer words.

    Args:
        tokenizer: of the model.
        lengths: tokens of every item.
        seed: of everything random.
        haystacks: long texts; None is prose and code that come with Python.
        words: of a pass phrase, drawn from the 26 of the NATO alphabet.
        needles: pass phrases in a prompt, at most ten.

    Returns:
        An item for every length, in order.

    Raises:
        InputError: a length that doesn't hold a phrase and its question.
    """
    texts = _texts(haystacks)
    draw = Random(seed)
    return [
        _passkey(tokenizer, length, draw, texts[index % len(texts)], (needles, words))
        for index, length in enumerate(lengths)
    ]


def answered_items(
    model: Any, tokenizer: Any, texts: Sequence[str], length: int, answer: int = 64, seed: int = 0
) -> list[Item]:
    """Documents with a request about all of their text, answered greedily by the model itself.

    A document is cut, or goes on with the texts after it, so that prompt and answer together take at most ``length``
    tokens. The request is rendered by the chat template if the tokenizer has one.

    Args:
        model: a causal language model; it answers with its own cache and is left as it was.
        tokenizer: its tokenizer.
        texts: the documents; one item each.
        length: tokens of an item at most.
        answer: tokens of an answer at most; fewer where the model ends it. A token that ends it is part of it.
        seed: of the choice among requests.

    Returns:
        An item for every text, in order.

    Raises:
        InputError: a length that leaves no room for text.
    """
    draw = Random(seed)
    ends = frozenset(end_tokens(model))
    items = []
    with evaluating(model):
        for index in range(len(texts)):
            whole = "\n\n".join([*texts[index:], *texts[:index]])
            prompt = _request(tokenizer, whole, draw.choice(REQUESTS), length - answer)
            said = greedy(model, torch.tensor(prompt), answer, ends)
            ids = torch.cat([torch.tensor(prompt), said])
            supervised = torch.zeros(len(ids), dtype=torch.bool)
            supervised[len(prompt) - 1 : len(ids) - 1] = True
            items.append(Item(ids, supervised, "answered", len(prompt)))
    return items


def greedy(model: Any, prompt: Tensor, tokens: int, ends: frozenset[int]) -> Tensor:
    """The likeliest token, again and again, with a cache of the model's own kinds of layers.

    Args:
        model: in evaluation mode.
        prompt: ``[T]``.
        tokens: at most so many.
        ends: tokens that end the answer.

    Returns:
        ``[n]``, int64 on the CPU, with the token that ends it.
    """
    past = cache_for(model, len(prompt) + tokens)
    for part in prompt.unsqueeze(0).to(model.device).split(CHUNK, dim=1):
        found = model(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1)
    said: list[int] = []
    while True:
        said.append(int(found.logits[0, -1].argmax()))
        if said[-1] in ends or len(said) == tokens:
            return torch.tensor(said)
        fed = torch.tensor([said[-1:]], device=model.device)
        found = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)


def text_windows(
    tokenizer: Any, lengths: Sequence[int], seed: int = 0, haystacks: Sequence[str] | None = None
) -> list[Tensor]:
    """Plain text, ``[length]`` tokens each, from anywhere in the haystacks, which take turns."""
    texts = _texts(haystacks)
    draw = Random(seed)
    first = token_ids(tokenizer, "")
    return [
        torch.tensor((first + _filler(tokenizer, texts[index % len(texts)], length, draw))[:length])
        for index, length in enumerate(lengths)
    ]


def digest(items: Sequence[Item]) -> str:
    """sha256 of the prompts: which tokens, of which kind, and where they are judged."""
    found = hashlib.sha256()
    for item in items:
        found.update(f"{item.kind} {item.context} {len(item.ids)}\n".encode())
        found.update(item.ids.cpu().numpy().tobytes())
        found.update(item.supervised.cpu().numpy().tobytes())
    return found.hexdigest()


def _passkey(tokenizer: Any, length: int, draw: Random, haystack: str, size: tuple[int, int]) -> Item:
    """One item with so many needles of so many words."""
    total = length // BLOCK * BLOCK
    needles, questions = _phrases(tokenizer, total, draw, *size)
    begin, end = token_ids(tokenizer, INTRODUCTION), _ids(tokenizer, END)
    room = total - sum(map(len, (begin, end, *(before + key + after for before, key, after in needles + questions))))
    if room < 0:
        least = f"{-(room - total) // BLOCK * BLOCK + BLOCK} or more"
        raise InputError("heads.lengths", length, "is too short for a pass phrase and its question", allowed=least)
    filler = _filler(tokenizer, haystack, room, draw)
    ids, places = list(begin), []
    start = 0
    depths = sorted(draw.sample([0.05 + 0.9 * step / 999 for step in range(1000)], len(needles)))
    for depth, (before, key, after) in zip(depths, needles, strict=True):
        stop = round(depth * room)
        ids += filler[start:stop] + before
        places.append((len(ids), len(ids) + len(key)))
        ids += key + after
        start = stop
    ids += filler[start:] + end
    context = len(ids)
    supervised = torch.zeros(total, dtype=torch.bool)
    asked = []
    for index in draw.sample(range(len(questions)), len(questions)):
        before, key, after = questions[index]
        answer = (len(ids) + len(before), len(ids) + len(before) + len(key))
        asked.append(Asked(len(ids), answer, places[index]))
        supervised[answer[0] - 1 : answer[1] - 1] = True
        ids += before + key + after
    return Item(torch.tensor(ids), supervised, "passkey", context, tuple(asked))


Pieces = tuple[list[int], list[int], list[int]]
"""Tokens before a phrase, the phrase's own, and those after it."""


def _phrases(tokenizer: Any, total: int, draw: Random, count: int, words: int) -> tuple[list[Pieces], list[Pieces]]:
    """Needles and their questions, in the order of the ordinals; as many and as long as half the tokens hold."""
    alphabet = NATO.split()
    chosen = [[draw.choice(alphabet) for _ in range(words)] for _ in ORDINALS[:count]]
    while True:
        needles, questions, taken = [], [], 0
        for ordinal, phrase in zip(ORDINALS, chosen, strict=False):
            key = _ids(tokenizer, f" {' '.join(phrase[:words])}")
            lead = f"The {ordinal} pass phrase to remember is:"
            needle = _ids(tokenizer, f"\n\n{lead}"), key, _ids(tokenizer, ".\n\n")
            # The answer begins as the needle does: small models would rather talk about pass phrases than say one.
            asks = f"Question: What is the {ordinal} pass phrase in the text above?\nAnswer: {lead}"
            question = _ids(tokenizer, asks), key, _ids(tokenizer, ".\n")
            taken += sum(map(len, (*needle, *question)))
            if taken > total // 2:
                break
            needles.append(needle)
            questions.append(question)
        if needles:
            return needles, questions
        if words <= LEAST_WORDS:
            return [needle], [question]
        words = max(LEAST_WORDS, words // 2)


def _request(tokenizer: Any, document: str, request: str, room: int) -> list[int]:
    """A prompt of at most ``room`` tokens with as much of a document as fits."""
    mark = "\u241e"

    def frame(text: str) -> list[int]:
        content = f"{text}\n\n{request}"
        if not tokenizer.chat_template:
            return token_ids(tokenizer, f"{content}\n\nAnswer:")
        turn = [{"role": "user", "content": content}]
        return _ids(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    allowed = room - len(frame(mark))
    if allowed < 1:
        raise InputError("heads.lengths", room, "tokens are too few for a request about a text")
    # Tokens at the seams depend on both sides, so that a text cut by its own tokens may come out longer in its frame.
    start = 0
    own = _tokens(tokenizer, lambda count: document[:count], allowed)
    while len(prompt := frame(tokenizer.decode(own[: allowed - start]))) > room:
        start += len(prompt) - room
    return prompt


def _filler(tokenizer: Any, haystack: str, count: int, draw: Random) -> list[int]:
    """So many tokens of a text from a random line on, from its beginning again where it ends."""
    place = haystack.find("\n", draw.randrange(len(haystack))) + 1
    turned = haystack[place:] + haystack[:place]
    if not turned.endswith("\n"):
        turned += "\n"
    return _tokens(tokenizer, lambda size: (turned * (size // len(turned) + 1))[:size], count, endless=True)


def _tokens(tokenizer: Any, text: Callable[[int], str], count: int, endless: bool = False) -> list[int]:
    """At most so many tokens from the beginning of a text of which no more is read than needed."""
    size = count * CHARACTERS_A_TOKEN + 1
    while True:
        part = text(size)
        # One more than is wanted: the last token may be cut by the end of the part.
        found = _ids(tokenizer, part)
        if len(found) > count or (not endless and len(part) < size):
            return found[:count]
        size *= 2


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _texts(haystacks: Sequence[str] | None) -> list[str]:
    texts = [text for text in (_shipped() if haystacks is None else haystacks) if text.strip()]
    if not texts:
        raise InputError("heads", None, "there is no text to hide pass phrases in")
    return texts


@cache
def _shipped() -> tuple[str, str]:
    """Prose and code that come with Python."""
    files = sorted(Path(hashlib.__file__).parent.glob("*.py"))
    code = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files[:CODE_FILES])
    prose = "\n\n".join(open_text(PYDOC).documents)
    return (prose, code) if code else (prose, prose)

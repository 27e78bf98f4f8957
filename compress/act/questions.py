"""Questions with a right answer, by which heads are chosen: of lm-eval's tasks, or made of plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch

from compress.calibrate.errors import InputError
from compress.calibrate.text import open_text
from compress.evalsuite.harness import load_tasks
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.task_errors import blamed_on
from compress.heads.data import Item

OPTION = "act.tasks"
CHARACTERS_A_TOKEN = 8  # more than any text needs


@dataclass(frozen=True)
class Question:
    """A prompt with its possible answers.

    Attributes:
        answers: the prompt with each of them; loss is of the answer's tokens.
        gold: number of the right one.
        source: the task, or ``text``.
    """

    answers: tuple[Item, ...]
    gold: int
    source: str

    @property
    def right(self) -> Item:
        """The prompt with the right answer."""
        return self.answers[self.gold]


@dataclass(frozen=True)
class Wanted:
    """Which questions of tasks.

    Attributes:
        tasks: names of lm-eval tasks, groups or tags.
        split: of their data.
        folder: further task files.
        count: questions of each task, at most.
        longest: tokens of a prompt with its answer; longer ones are left out.
        seed: of the choice among them.
    """

    tasks: tuple[str, ...]
    split: Literal["train", "validation"]
    folder: str | None
    count: int
    longest: int
    seed: int


def task_questions(tokenizer: Any, wanted: Wanted) -> list[Question]:
    """Questions of tasks, without examples before them, as lm-eval's templates write them.

    Raises:
        InputError: a task doesn't exist, its data can't be had, it has no such split, or it asks for other things than
            an answer behind a prompt.
    """
    try:
        loaded = load_tasks(wanted.tasks, EvalSettings(task_path=wanted.folder, num_fewshot=0))
        named = loaded["tasks"].items()
        return [question for name, task in named for question in _of_task(tokenizer, name, task, wanted)]
    except InputError as error:
        raise error.under(error.option.replace("eval.", "act.")) from error


def text_questions(tokenizer: Any, source: str, count: int, tokens: int, seed: int) -> list[Question]:
    """Windows of a text, whose second half is the answer to the first.

    Args:
        tokenizer: of the model.
        source: as :func:`compress.calibrate.text.open_text` takes it.
        count: windows.
        tokens: of a window.
        seed: of where they begin.

    Raises:
        InputError: the text can't be read, or is shorter than a window.
    """
    text = "\n\n".join(open_text(source, option="act.text").documents)
    draw, found = Random(seed), []
    for _ in range(count):
        begin = draw.randrange(max(1, len(text) - CHARACTERS_A_TOKEN * tokens))
        ids = tokenizer(text[begin : begin + CHARACTERS_A_TOKEN * tokens], add_special_tokens=False)["input_ids"]
        if len(ids) < tokens:
            raise InputError("act.text", source, f"has {len(ids)} tokens, and a window {tokens}")
        found.append(Question((_item(ids[:tokens], tokens // 2),), 0, "text"))
    return found


def _of_task(tokenizer: Any, name: str, task: Any, wanted: Wanted) -> list[Question]:
    there = {"train": task.has_training_docs(), "validation": task.has_validation_docs()}
    if not there[wanted.split]:
        problem = f"has no {wanted.split} questions"
        other = next((split for split, has in there.items() if has), None)
        fix = None if other is None else f"set act.split={other}, and don't score on the same questions"
        raise InputError(OPTION, name, problem, fix=fix)
    documents = list(task.training_docs() if wanted.split == "train" else task.validation_docs())
    order = Random(wanted.seed).sample(range(len(documents)), len(documents))
    found: list[Question] = []
    for number in order:
        if len(found) == wanted.count:
            break
        with blamed_on(name, None, number):
            question = _question(tokenizer, name, task, documents[number])
        if max(len(item.ids) for item in question.answers) <= wanted.longest:
            found.append(question)
    return found


def _question(tokenizer: Any, name: str, task: Any, document: Any) -> Question:
    prompt, target = task.doc_to_text(document), task.doc_to_target(document)
    between = task.get_config("target_delimiter")
    between = " " if between is None else between
    if not isinstance(prompt, str) or isinstance(target, list):
        raise InputError(OPTION, name, "its prompts differ by answer, or several are right", fix="choose another")
    if task.OUTPUT_TYPE != "multiple_choice":
        return Question((_asked(tokenizer, prompt, between + str(target)),), 0, name)
    choices = list(task.doc_to_choice(document))
    gold = choices.index(target) if isinstance(target, str) else int(target)
    return Question(tuple(_asked(tokenizer, prompt, between + choice) for choice in choices), gold, name)


def _asked(tokenizer: Any, prompt: str, answer: str) -> Item:
    """Tokens as lm-eval splits them: spaces at the prompt's end belong to the answer."""
    kept = prompt.rstrip()
    ids = tokenizer(kept + prompt[len(kept) :] + answer)["input_ids"]
    return _item(ids, min(len(tokenizer(kept)["input_ids"]), len(ids) - 1))


def _item(ids: Sequence[int], context: int) -> Item:
    """The answer begins behind ``context`` tokens, and is judged from the one before it."""
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[max(0, context - 1) : -1] = True
    return Item(torch.tensor(ids), supervised, "answered", context)

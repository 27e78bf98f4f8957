"""What an evaluation needs beside models: settings, texts, data. What can be wrong with them is found here."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from compress.calibrate.errors import InputError
from compress.calibrate.hub import hub_problem
from compress.calibrate.text import PYDOC, check_text, open_text
from compress.evalsuite.catalogue import harness_tasks, long_context_tasks, text_tasks, validate_tasks
from compress.evalsuite.harness import Samples, load_tasks
from compress.evalsuite.longcontext import check_long_context
from compress.evalsuite.longcontext import prepare as prepare_prompts
from compress.evalsuite.score import Material, long_settings, tokenise
from compress.evalsuite.scores import Scores
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.sliding import check_windows, lay_out
from compress.options import EvalOptions
from compress.schema import Eval

AUTO, REPEAT = "auto", "repeat"
HUB_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"

Asked = Eval | EvalOptions
"""A recipe's section or a command's options: they have the same names."""


@dataclass(frozen=True)
class EvalText:
    """A text: its name, where it is from, and the text itself."""

    name: str
    origin: str
    text: str


@dataclass(frozen=True)
class Prepared:
    """An evaluation that lacks nothing but models.

    Attributes:
        tasks: what to score.
        settings: how.
        material: texts and lm-eval's tasks.
        text: origin of the text of perplexity and divergence, if it was asked for.
        haystack: origin of the text around needles, if long-context tasks were asked for.
        on_scores: told which model was scored (its name, or ``original``), its scores, and what lm-eval logged.
    """

    tasks: tuple[str, ...]
    settings: EvalSettings
    material: Material
    text: str | None
    haystack: str | None
    on_scores: Callable[[str, Scores, Samples], object] | None = None


def check_eval(asked: Asked, tasks: Sequence[str], context: int | None) -> None:
    """Preflight of an evaluation; reads no data and no text.

    Args:
        asked: section or options.
        tasks: what to score.
        context: the longest sequence that the model's config allows, or None.

    Raises:
        InputError: an unknown task, a text that can't be read, a window, stride or length that doesn't fit.
    """
    validate_tasks(tasks, settings_of(asked).task_path)
    check_context(asked, tasks, context)
    if text_tasks(tasks) and asked.text != AUTO:
        check_text(asked.text, option="eval.text")
    if long_context_tasks(tasks) and asked.haystack not in (AUTO, REPEAT):
        check_text(asked.haystack, option="eval.haystack")


def check_context(asked: Asked, tasks: Sequence[str], context: int | None) -> None:
    """The part of ``check_eval`` that depends on the model.

    Raises:
        InputError: a window, stride or length that doesn't fit.
    """
    settings = settings_of(asked)
    if text_tasks(tasks):
        check_windows(settings.window, settings.stride, settings.windows, context, settings.feed)
    if long := long_context_tasks(tasks):
        check_long_context(long, long_settings(settings), context)


def prepare_eval(asked: Asked, tasks: Sequence[str], tokenizer: Any) -> Prepared:
    """Read texts and the data of lm-eval's tasks, before any model is loaded.

    Args:
        asked: section or options.
        tasks: what to score.
        tokenizer: of the models.

    Raises:
        InputError: the data of a task can't be had (it is missing, or out of reach without the network) or doesn't fit
            its task file; a text that
            can't be read or is shorter than a window; a prompt too short for its task; questions in a chat template
            for a model that has none.
    """
    settings = settings_of(asked)
    loaded = None
    if named := harness_tasks(tasks):
        if settings.apply_chat_template and not tokenizer.chat_template:
            raise InputError("eval.apply_chat_template", "true", "the model has no chat template")
        loaded = load_tasks(named, settings)
    text = open_eval_text(asked.text, "eval.text") if text_tasks(tasks) else None
    haystack, place = None, None
    if long := long_context_tasks(tasks):
        place = "RULER's repeated sentence"
        if asked.haystack != REPEAT:
            same = text is not None and asked.haystack == asked.text
            haystack = text if same else open_eval_text(asked.haystack, "eval.haystack")
            place = None if haystack is None else haystack.origin
        prepare_prompts(long, tokenizer, long_settings(settings), None if haystack is None else haystack.text)
    tokens = None if text is None else tokenise(text, tokenizer)
    if tokens is not None:
        lay_out(tokens.ids.numel(), settings.window, settings.stride, settings.windows, settings.feed)
    material = Material(tokens, haystack, tasks=loaded)
    return Prepared(tuple(tasks), settings, material, None if text is None else text.origin, place)


def settings_of(asked: Asked) -> EvalSettings:
    """The settings of the same names; bars are drawn where somebody sees them."""
    names = {field.name for field in fields(EvalSettings)} & set(_names(asked))
    values = {name: getattr(asked, name) for name in names}
    if isinstance(values["task_path"], Path):
        values["task_path"] = str(values["task_path"])
    values["lengths"] = tuple(dict.fromkeys(values["lengths"]))
    return EvalSettings(**values, progress=sys.stderr.isatty())


def open_eval_text(spec: str, option: str) -> EvalText:
    """A text to score on.

    ``auto`` is WikiText-2's test split where the Hub can be reached, else Python's own documentation.

    Raises:
        InputError: the text can't be read.
    """
    reason = ""
    if spec == AUTO:
        problem = hub_problem()
        spec = HUB_TEXT if problem is None else PYDOC
        reason = "" if problem is None else f" (not WikiText-2, since {problem})"
    source = open_text(spec, option=option)
    return EvalText(source.name, source.origin + reason, "\n\n".join(source.documents))


def _names(asked: Asked) -> list[str]:
    return list(Eval.model_fields) if isinstance(asked, Eval) else [field.name for field in fields(asked)]

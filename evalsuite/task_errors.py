"""Task files that don't fit their data: found on the documents alone where that is possible, and always said clearly.

A task file is a program: templates, names of columns, Python functions. What goes wrong in it may be any of Python's
usual errors, in the middle of an evaluation. It is the author's to mend, so that it becomes an ``InputError``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any

from compress.calibrate.errors import InputError
from jinja2 import TemplateError

MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
)
"""What a task file raises that doesn't fit its data."""

LONGEST = 300
"""Characters of a cause: some hold a whole document."""

_KEYS = ("doc_to_", "process_")
"""How lm-eval's functions begin that do what a key of the same name says."""

_SPLITS = "dataset_dict.py"
"""Where datasets looks for a split."""

_NO_ROWS = "out of bounds for size 0"
"""What datasets says of the first row of a table that has none."""

_NUMBERS = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
"""A made-up answer to each kind of request that isn't answered by a text."""


class _MisfitError(ValueError):
    """A misfit that isn't an error of Python's."""


@contextmanager
def blamed_on(task: str, file: Path | None, document: int | None = None) -> Iterator[None]:
    """What a task file raises becomes an error that names task, file, number of the document if given, and cause.

    Raises:
        InputError: anything out of ``MISFITS`` was raised.
    """
    try:
        yield
    except InputError:
        raise
    except MISFITS as error:
        named = "the task file" if file is None else f"the task file {file}"
        place = "" if document is None else f"document {document}: "
        raise InputError("eval.tasks", task, f"{named} does not fit its data: {place}{_cause(error)}") from error


def guard(task: Any, name: str, file: Path | None) -> None:
    """From here on, whatever lm-eval calls of a task in an evaluation is ``blamed_on`` its file."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with blamed_on(name, file):
                return function(*args, **kwargs)

        return call

    known, aggregation = _known_aggregations(), task.aggregation

    def aggregations() -> dict[str, Any]:
        # lm-eval knows its own functions by identity, to find their standard errors.
        return {metric: found if found in known else watched(found) for metric, found in aggregation().items()}

    for method in ("build_all_requests", "apply_filters", "process_results", "doc_to_target"):
        setattr(task, method, watched(getattr(task, method)))
    task.aggregation = aggregations


def try_first_document(task: Any, name: str, file: Path | None, system_instruction: str | None) -> None:
    """Build a task's requests for its first document, and score made-up answers to them; takes no model.

    Args:
        task: lm-eval's task, with its data, number of examples and seed; the seed has to be set again afterwards.
        name: its name.
        file: where it is defined, if that is known.
        system_instruction: as in the settings.

    Raises:
        InputError: the task file doesn't fit the document.
    """
    with blamed_on(name, file):
        task.build_all_requests(limit=1, rank=0, world_size=1, system_instruction=system_instruction)
        requests, document = task.instances, task.instances[0].doc
        if task.OUTPUT_TYPE == "multiple_choice":
            _check_choices(task, document)
        elif task.OUTPUT_TYPE == "generate_until":
            _check_stops(requests[0].args[1])
        standard = _scored_by_lm_eval(task)
        if not standard and not all(request.request_type in _NUMBERS for request in requests):
            return  # a function of the author's need not take a text that no model would say
        for request in requests:
            request.resps += [_NUMBERS.get(request.request_type, "")] * request.repeats
        task.apply_filters()
        for key in requests[0].filtered_resps:
            found = task.process_results(document, [request.filtered_resps[key] for request in requests])
            if standard:
                _check_metrics(task, found)


def try_documents(task: Any, name: str, file: Path | None, limit: int | None) -> None:
    """Let the task file read every document that will be asked about, which takes no model and a moment.

    Args:
        task: lm-eval's task, with its data.
        name: its name.
        file: where it is defined, if that is known.
        limit: number of documents; None for all.

    Raises:
        InputError: the task file doesn't fit one of them.
    """
    choices = task.OUTPUT_TYPE == "multiple_choice"
    for number, (_, document) in enumerate(task.doc_iterator(limit=limit), 1):
        with blamed_on(name, file, number):
            task.doc_to_text(document)
            task.doc_to_target(document)
            if choices:
                task.doc_to_choice(document)


def check_examples(task: Any, name: str) -> None:
    """Whether a task has documents for as many examples as were asked for on the command line or in the recipe.

    Raises:
        InputError: it has fewer.
    """
    from lm_eval.api.samplers import SAMPLER_REGISTRY

    count, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if sampler is None or type(sampler) not in SAMPLER_REGISTRY.values():
        return
    # Where lm-eval leaves out the question itself, it draws one example more than are shown.
    most = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
    if count > most:
        problem = f"the task {name} has {len(sampler.df)} documents to take examples from"
        raise InputError("eval.num_fewshot", count, problem, allowed=f"0 to {most}")


def _check_choices(task: Any, document: Any) -> None:
    """What lm-eval would count as wrong answers of every model, without a word."""
    choices = task.doc_to_choice(document)
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(one, str) for one in choices):
        raise _MisfitError(f"doc_to_choice gives {_short(choices)} for the first document, which is no list of texts")
    if not _scored_by_lm_eval(task):
        return
    answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if not all(_among(choices, one) for one in (answer if isinstance(answer, list) else [answer])):
        given = f"the answer to the first document, {_short(answer)}"
        raise _MisfitError(f"{given}, is neither one of its {len(choices)} choices nor the number of one")


def _check_stops(options: dict[str, Any]) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    for stop in normalize_gen_kwargs(options)["until"]:
        if not isinstance(stop, str):
            raise _MisfitError(f"generation_kwargs.until holds {_short(stop)}, which is no text")


def _check_metrics(task: Any, found: dict[str, Any]) -> None:
    """Whether lm-eval finds the metrics of one document, and can put those of two together."""
    for metric, function in task.aggregation().items():
        if function is None:
            raise _MisfitError(f"lm-eval has no aggregation of the name that is given for the metric {metric}")
        if metric not in found and task.OUTPUT_TYPE != "generate_until" and metric != "bypass":
            raise _MisfitError(f"lm-eval has no metric {metric} for the output type {task.OUTPUT_TYPE}")
        if metric in found and function in _known_aggregations():
            function([found[metric], found[metric]])


def _among(choices: Sequence[str], answer: Any) -> bool:
    return 0 <= answer < len(choices) if isinstance(answer, int | float) else answer in choices


def _scored_by_lm_eval(task: Any) -> bool:
    from lm_eval.api.task import ConfigurableTask

    own = getattr(type(task), "process_results", None) is ConfigurableTask.process_results
    return own and task.config.process_results is None


def _known_aggregations() -> list[Any]:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    return list(AGGREGATION_REGISTRY.values())


def _cause(error: BaseException) -> str:
    """The key of the task file that was being read, if one was, and what Python says."""
    frames = extract_tb(error.__traceback__)
    if isinstance(error, KeyError) and frames[-1].filename.endswith(_SPLITS):
        return f"its data has no split {error}"
    if isinstance(error, IndexError) and str(error).endswith(_NO_ROWS):
        return "no document is left of its data"
    parts = [frame.name for frame in frames if frame.name.startswith(_KEYS)][-1:]
    parts += ["" if isinstance(error, _MisfitError) else type(error).__name__, _cut(" ".join(str(error).split()))]
    return ": ".join(part for part in parts if part)


def _short(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

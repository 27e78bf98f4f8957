"""``compress eval``: a model scored, alone or beside a baseline."""

import sys
from dataclasses import dataclass
from typing import Any

from compress.calibrate.errors import InputError
from compress.calibrate.hub import hub_problem
from compress.calibrate.text import PYDOC, check_text, open_text
from compress.evalsuite.catalogue import PERPLEXITY, validate_tasks
from compress.evalsuite.compare import Row, compare, markdown_table
from compress.evalsuite.harness import load_tasks
from compress.evalsuite.score import Scores, finite, score
from compress.evalsuite.settings import EvalSettings
from compress.memory import release
from compress.options import EvalOptions
from compress.runtime import load

HUB_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"


@dataclass(frozen=True)
class EvalText:
    """The text of the perplexity: its name, where it is from, and the text itself."""

    name: str
    origin: str
    text: str


@dataclass(frozen=True)
class EvalOutcome:
    """What ``compress eval`` found.

    Attributes:
        scores: of the model.
        baseline: of the baseline, if one was asked for.
        rows: the two side by side.
        text: origin of the perplexity text.
    """

    scores: Scores
    baseline: Scores | None
    rows: list[Row]
    text: str | None

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "text": self.text,
            "scores": self.scores.to_json(),
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "rows": rows_json(self.rows),
        }

    def lines(self) -> list[str]:
        """For a terminal: one table."""
        lines = [f"text: {self.text}"] if self.text else []
        if self.baseline is not None:
            return [*lines, *markdown_table(self.rows).splitlines()]
        lines += ["| task | metric | value |", "|---|---|---:|"]
        for metric in self.scores.metrics:
            error = "" if metric.stderr is None else f" ± {metric.stderr:.4g}"
            lines.append(f"| {metric.task} | {metric.metric} | {metric.value:.5g}{error} |")
        return lines


def rows_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows of a comparison as JSON types; a figure that isn't finite is null."""
    found: list[dict[str, Any]] = finite(
        [
            {
                "task": row.task,
                "metric": row.metric,
                "before": row.before.value,
                "before_stderr": row.before.stderr,
                "after": row.after.value,
                "after_stderr": row.after.stderr,
                "delta": row.delta,
                "ratio": row.ratio,
            }
            for row in rows
        ]
    )
    return found


def eval_text(spec: str, tasks: list[str] | tuple[str, ...]) -> EvalText | None:
    """The perplexity text, or None where perplexity isn't asked for.

    ``auto`` is WikiText-2's test split where the Hub can be reached, else Python's own documentation.

    Raises:
        InputError: the text can't be read.
    """
    if PERPLEXITY not in tasks:
        return None
    reason = ""
    if spec == "auto":
        problem = hub_problem()
        spec = HUB_TEXT if problem is None else PYDOC
        reason = "" if problem is None else f" (not WikiText-2, since {problem})"
    source = open_text(spec, option="eval.text")
    return EvalText(source.name, source.origin + reason, "\n\n".join(source.documents))


def check_eval(tasks: list[str] | tuple[str, ...], task_path: str | None, text: str) -> None:
    """Preflight of an evaluation.

    Raises:
        InputError: an unknown task, or a text that can't be read.
    """
    validate_tasks(list(tasks), task_path)
    if PERPLEXITY in tasks and text != "auto":
        check_text(text, option="eval.text")


def check_data(tasks: list[str] | tuple[str, ...], task_path: str | None) -> None:
    """Load the data of lm-eval's tasks, before any model is loaded: from files, the Hub's cache, or the Hub.

    Raises:
        InputError: the data of a task can't be had.
    """
    named = [task for task in tasks if task != PERPLEXITY]
    if named:
        load_tasks(named, EvalSettings(task_path=task_path))


def evaluate(model: str, tasks: list[str], options: EvalOptions | None = None) -> EvalOutcome:
    """Score a model, and a baseline on the same items if one is named.

    Args:
        model: an artifact, a Hub id, a folder or a ``.gguf`` file.
        tasks: lm-eval tasks by name, and ``perplexity``.
        options: how.

    Raises:
        InputError: as ``check_eval`` and :func:`compress.load`; a baseline that can't be compared.
    """
    options = options or EvalOptions()
    if not tasks:
        raise InputError("--tasks", None, "names no task", fix="for instance --tasks perplexity")
    task_path = None if options.task_path is None else str(options.task_path)
    check_eval(tasks, task_path, options.text)
    check_data(tasks, task_path)
    text = eval_text(options.text, tasks)
    settings = EvalSettings(
        window=options.window,
        windows=options.windows,
        limit=options.limit,
        task_path=task_path,
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        progress=sys.stderr.isatty(),
    )

    def measure(name: str) -> Scores:
        loaded, tokenizer = load(name, device=options.device, trust_remote_code=options.trust_remote_code)
        found = score(loaded, tokenizer, tasks, settings, text)
        del loaded
        release()
        return found

    after = measure(model)
    before = None if options.baseline is None else measure(options.baseline)
    rows = [] if before is None else compare(before, after)
    return EvalOutcome(after, before, rows, None if text is None else text.origin)

"""Multiple choice by lm-eval's own ``HFLM`` and by ours: seconds, and whether every answer is equal.

Both get the same loaded model and the same task, and are timed from the documents to lm-eval's results. The questions
are taken in slices, and within each slice the two run one after the other, in turns who begins: what else runs on the
machine is spread over both. ``HFLM`` runs at its best batch size, which is found first, on questions from all over the
task. Prints the table of ``docs/results.md``.

    python benchmarks/multiple_choice.py --model MODEL --task arc_easy_local --task-path FOLDER [--questions 0:570]

For the figures of the documentation MODEL is the file that ``make setup`` fetches, and the task ARC-Easy's validation
split (570 questions) as a local file.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import click
from compress.evalsuite.bridge import LoadedModel
from compress.evalsuite.harness import load_tasks
from compress.evalsuite.quiet import quiet, seeded, single_process, templates_kept, weights_untouched
from compress.evalsuite.settings import EvalSettings
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from compress.runtime import load


@dataclass
class Side:
    """One of the two.

    Attributes:
        name: as the table calls it.
        make: makes its model interface.
        stack: the context managers under which it runs.
        seconds: so far, on the clock.
        cpu_seconds: so far, of all threads together; other programs hardly change them.
        samples: lm-eval's record of each question so far.
    """

    name: str
    make: Callable[[], Any]
    stack: tuple[Callable[[], Any], ...]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)

    def run(self, tasks: Callable[[], Any], task: str, questions: list[int]) -> float:
        """Answer questions; seconds."""
        loaded = tasks()
        with ExitStack() as stack:
            for manager in self.stack:
                stack.enter_context(manager())
            start, cpu_start = time.perf_counter(), time.process_time()
            results = evaluator.evaluate(self.make(), loaded, samples={task: questions}, bootstrap_iters=0)
            seconds = time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start
        self.seconds += seconds
        self.samples += results["samples"][task]
        return seconds

    def mean(self, metric: str) -> float:
        """Mean of a metric over all questions so far."""
        return sum(sample[metric] for sample in self.samples) / len(self.samples)


def best_batch_size(trial: Callable[[int], float], sizes: list[int]) -> int:
    """The fastest of some batch sizes, each tried twice."""
    seconds = {size: trial(size) for size in sizes}
    for size in reversed(sizes):
        seconds[size] = min(seconds[size], trial(size))
        print(f"HFLM, batch size {size}: {seconds[size]:.1f} s on the trial questions", file=sys.stderr, flush=True)
    return min(seconds, key=seconds.__getitem__)


def differences(theirs: Side, ours: Side) -> tuple[dict[str, int], float, int]:
    """Questions that differ by metric, the largest difference of a log-likelihood, and greedy flags that differ."""
    largest, flags = 0.0, 0
    metrics = dict.fromkeys(theirs.samples[0]["metrics"], 0)
    for left, right in zip(theirs.samples, ours.samples, strict=True):
        if left["doc_hash"] != right["doc_hash"]:
            raise click.ClickException("the two did not answer the same questions")
        for metric in metrics:
            metrics[metric] += left[metric] != right[metric]
        for ((mine, greedy),), ((other, flag),) in zip(left["resps"], right["resps"], strict=True):
            largest, flags = max(largest, abs(mine - other)), flags + (greedy != flag)
    return metrics, largest, flags


@click.command()
@click.option("--model", required=True)
@click.option("--task", required=True, help="A multiple-choice task of lm-eval.")
@click.option("--task-path", help="Folder of task files.")
@click.option("--questions", default="0:", show_default=True, help="START:END.")
@click.option("--slices", default=6, show_default=True)
@click.option("--batch-sizes", default="1,4,8,16,32", show_default=True, help="What is tried for HFLM.")
@click.option("--trial", default=16, show_default=True, help="Questions of the trial.")
def main(
    model: str, task: str, task_path: str | None, questions: str, slices: int, batch_sizes: str, trial: int
) -> None:
    """Print the table."""
    settings = EvalSettings(task_path=task_path)

    def tasks() -> Any:
        return load_tasks([task], settings)

    documents = len(list(tasks()["tasks"][task].eval_docs))
    start, _, end = questions.partition(":")
    chosen = list(range(documents))[int(start or 0) : int(end) if end else None]
    loaded, tokenizer = load(model)

    def stock(batch_size: int) -> Side:
        make = lambda: HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)  # noqa: E731
        return Side(f"lm-eval's HFLM, batch size {batch_size}", make, (quiet, seeded))

    spread = chosen[:: max(1, len(chosen) // trial)][:trial]
    sizes = [int(size) for size in batch_sizes.split(",")]
    size = best_batch_size(lambda size: stock(size).run(tasks, task, spread), sizes) if len(sizes) > 1 else sizes[0]
    theirs = stock(size)
    ours = Side(
        "ours",
        lambda: LoadedModel(loaded, tokenizer, settings, (sys.stdout, sys.stderr)),
        (quiet, seeded, single_process, templates_kept, lambda: weights_untouched(loaded)),
    )
    step = -(-len(chosen) // slices)
    for number, first in enumerate(range(0, len(chosen), step)):
        part = chosen[first : first + step]
        for side in (theirs, ours) if number % 2 else (ours, theirs):
            seconds = side.run(tasks, task, part)
            print(f"{side.name}: {len(part)} questions, {seconds:.1f} s", file=sys.stderr, flush=True)
    metrics, largest, flags = differences(theirs, ours)
    print("| " + " | ".join(["", "questions", "seconds", "CPU seconds", *metrics]) + " |")
    print("|---" + "|---:" * (3 + len(metrics)) + "|")
    for side in (theirs, ours):
        count = len(side.samples)
        figures = [f"{side.seconds:.1f}", f"{side.cpu_seconds:.1f}", *(f"{side.mean(name):.4f}" for name in metrics)]
        print("| " + " | ".join([side.name, str(count), *figures]) + " |")
    equal = "yes" if not any(metrics.values()) else ", ".join(f"{n} differ in {name}" for name, n in metrics.items())
    ratio, cpu_ratio = ours.seconds / theirs.seconds, ours.cpu_seconds / theirs.cpu_seconds
    print(f"\nours / HFLM: {ratio:.3f} of the time, {cpu_ratio:.3f} of the CPU time")
    print(f"equal answers to every question: {equal}")
    print(f"log-likelihoods differ by at most {largest:.1e} nats; greedy flags that differ: {flags}")


if __name__ == "__main__":
    main()

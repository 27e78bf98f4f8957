"""What an lm-eval task found for each single document: the ground of paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class TaskItems:
    """One task, document by document.

    Attributes:
        documents: lm-eval's hash of each document, in the order of the task.
        values: by ``metric,filter``, as in lm-eval's results: one figure a document. Metrics that aren't one number a
            document, such as those of a whole corpus, are left out.
    """

    documents: tuple[str, ...]
    values: dict[str, tuple[float, ...]]


def task_items(samples: Sequence[dict[str, Any]]) -> TaskItems:
    """The figures in lm-eval's logged samples of one task, of which there is one for each document and filter."""
    documents: dict[Any, str] = {}
    values: dict[str, list[Any]] = {}
    for sample in samples:
        documents[sample["doc_id"]] = sample["doc_hash"]
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return TaskItems(
        tuple(documents.values()),
        {
            name: tuple(float(value) for value in found)
            for name, found in values.items()
            if len(found) == len(documents) and all(isinstance(value, Real) for value in found)
        },
    )

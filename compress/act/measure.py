"""What the stage ``act`` measures, question by question, kept after each of them: a kill loses one question."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.act.gradient import calibrating, question_loss, slopes
from compress.act.questions import Question
from compress.evalsuite.head import evaluating
from compress.evalsuite.statistics import Paired, paired
from compress.events import StepDone
from compress.heads.layers import Layers
from compress.job import Job
from compress.plan import Calibration


@dataclass(frozen=True)
class Check:
    """Chosen heads on questions that didn't choose them.

    Attributes:
        loss: the model's with them against without.
        right: the same of questions whose right answer is the likeliest; None where the loss is of one answer.
    """

    loss: Paired
    right: Paired | None


class Measurer:
    """Measures questions, or goes on with it.

    Args:
        job: the run; the stage's state keeps what was measured.
        model: the model.
        how: what calibration does.
        choice: which loss, as :func:`slopes` has it.
    """

    def __init__(self, job: Job, model: PreTrainedModel, how: Calibration, choice: bool) -> None:
        self.job, self.model, self.how, self.choice = job, model, how, choice
        self.state: dict[str, Any] = job.folder.stage("act")

    def slopes(self, questions: Sequence[Question], total: int) -> tuple[Tensor, Tensor]:
        """Slopes [questions, layers, KV heads], and sinks a query head [questions, layers].

        Args:
            questions: in an order that is the same after a kill.
            total: steps of the stage.
        """
        kept = self.state.setdefault("slopes", [])
        layers = Layers(self.model)
        with evaluating(self.model), layers.tapped():
            for index in range(len(kept), len(questions)):
                begun = time.perf_counter()
                found = slopes(layers, questions[index], self.how, self.choice)
                kept.append({"by_beta": found.by_beta.tolist(), "sinks": found.sinks.tolist()})
                self._kept(index, total, begun, f"{float(found.sinks.mean()):.2f} sinks a head")
        return (
            torch.tensor([one["by_beta"] for one in kept], dtype=torch.float64),
            torch.tensor([one["sinks"] for one in kept], dtype=torch.float64),
        )

    def check(self, questions: Sequence[Question], heads: Mapping[int, Sequence[int]], first: int) -> Check | None:
        """Losses with and without the calibration of some heads, by layer; None without questions.

        Args:
            questions: others than those that chose.
            heads: KV heads by layer.
            first: steps of the stage before.
        """
        kept, tap = self.state.setdefault("check", []), calibrating(heads, self.how)
        layers = Layers(self.model)
        with evaluating(self.model), layers.tapped():
            for index in range(len(kept), len(questions)):
                begun = time.perf_counter()
                pair = [question_loss(layers, questions[index], own, self.choice) for own in (None, tap)]
                kept.append(pair)
                told = f"loss {pair[0][0]:.3f}, then {pair[1][0]:.3f}"
                self._kept(first + index, first + len(questions), begun, told)
        loss = _paired(kept, 0, higher_is_better=False)
        return None if loss is None else Check(loss, _paired(kept, 1, higher_is_better=True) if self.choice else None)

    def _kept(self, index: int, total: int, begun: float, told: str) -> None:
        self.job.folder.save()
        self.job.emit(StepDone(index, total, time.perf_counter() - begun, told))


def _paired(kept: Sequence[Any], field: int, higher_is_better: bool) -> Paired | None:
    before, after = ([float(one[which][field]) for one in kept] for which in range(2))
    return paired(before, after, higher_is_better=higher_is_better)

"""What the stage ``heads`` measures: prompts, scores and gates, each kept as soon as it is there.

The stage's state in the work folder holds finished scores, and of the influence what the prompts so far have added up
to; prompts and gates lie in files beside it. A kill loses the prompt or the step in hand.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.calibrate.text import PYDOC, open_text
from compress.events import Message, StepDone
from compress.fingerprint import fingerprint_of
from compress.heads import duo
from compress.heads.data import Item, answered_items, digest, passkey_items
from compress.heads.gauss_newton import gauss_newton
from compress.heads.influence import influence
from compress.heads.profile import HeadProfile
from compress.heads.scores import BLENDED, ScoreSettings, mean_rank, score
from compress.job import Job
from compress.plan_writer import Rule
from compress.schema import Heads

ANSWER = 64  # tokens of an answer to a document


@dataclass(frozen=True)
class Subject:
    """What is profiled, and how.

    Attributes:
        load: gives the model; called when something has to be measured.
        tokenizer: the model's.
        settings: the recipe's section.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    settings: Heads

    @cached_property
    def model(self) -> PreTrainedModel:
        """In memory from the first use on."""
        return self.load()


class Profiler:
    """Measures heads, or goes on with it.

    Args:
        job: the run; the stage's state keeps how far it is.
        subject: what is profiled.
        rule: what a streaming head would see.
    """

    def __init__(self, job: Job, subject: Subject, rule: Rule) -> None:
        self.job, self.subject, self.rule = job, subject, rule
        self.state: dict[str, Any] = job.folder.stage("heads")
        self.folder = job.folder.path
        self._items: list[Item] = []

    def items(self) -> list[Item]:
        """The prompts, in their order by length; made once."""
        path = self.folder / "heads-items.safetensors"
        if not self._items and path.exists():
            self._items = _read(path)
        if not self._items:
            self._items = prompts(self.subject)
            self.job.folder.save_tensors(path.name, _tensors(self._items))
            tokens = sum(len(item.ids) for item in self._items)
            self.job.emit(Message(f"heads: {len(self._items)} prompts of {tokens:,} tokens together"))
        self.state["prompts"] = digest(self._items)
        return self._items

    def score(self, name: str) -> Tensor:
        """A score by name, [layers, KV heads]."""
        if name not in self.state.get("scores", {}):
            begun = time.perf_counter()
            if "prompts" not in self.state:
                self.state["prompts"] = digest(self._how.items(self.subject.tokenizer))
            makers = {"influence": self._influence, "gauss_newton": self._gauss_newton, "blend": self._blend}
            own = makers.get(name)
            subject = self.subject
            values = score(name, subject.model, subject.tokenizer, self._how) if own is None else own()
            self.record(name, values, time.perf_counter() - begun)
            self.job.emit(Message(f"heads: score {name} in {self.state['seconds'][name]:.0f} s"))
        return torch.tensor(self.state["scores"][name])

    def gates(self, target: float | None) -> duo.Gates:
        """The gates of DuoAttention.

        Args:
            target: mean that they are led to; None for a fixed penalty.
        """
        settings, path = self.subject.settings, self.folder / "heads-gates.safetensors"
        how = replace(self._duo, target=target)
        started = begun = time.perf_counter()

        def keep(state: duo.State) -> None:
            nonlocal begun
            self.job.folder.save_tensors(path.name, state.tensors())
            now, last = time.perf_counter(), state.history[-1]
            told = f"loss {last.loss:.3g}, mean gate {last.mean:.3f}"
            self.job.emit(StepDone(len(state.history) - 1, settings.steps, now - begun, told))
            begun = now

        start = duo.State.from_tensors(load_file(path)) if path.exists() else None
        if start is not None and "gates" in self.state["scores"]:
            return duo.Gates(start.gates, start.history)
        found = duo.optimise(self.subject.model, self.items(), how, start, keep)
        self.record("gates", found.values, time.perf_counter() - started)
        return found

    def each(self, name: str, measure: Callable[[Item], Tensor]) -> Tensor:
        """The mean of what is measured on every prompt; kept after each of them.

        Args:
            name: under which it is kept.
            measure: gives a tensor of the same shape for every prompt.
        """
        items, kept = self.items(), self.state.setdefault(name, {"done": 0, "sum": 0.0})
        total = torch.tensor(kept["sum"], dtype=torch.float64)
        for index in range(kept["done"], len(items)):
            begun = time.perf_counter()
            total = total + measure(items[index]).double()
            kept.update(done=index + 1, sum=total.tolist())
            self.job.folder.save()
            told = f"{name} on {len(items[index].ids):,} tokens"
            self.job.emit(StepDone(index, len(items), time.perf_counter() - begun, told))
        return (total / len(items)).float()

    def profile(self) -> HeadProfile:
        """All scores so far, and what they depend on."""
        settings = self.subject.settings
        return HeadProfile(
            fingerprint=fingerprint_of(self.job.view.config),
            scores=self.state["scores"],
            items=self.state["prompts"],
            lengths=settings.lengths,
            seed=settings.seed,
            seconds=self.state["seconds"],
            settings=settings.model_dump(mode="json"),
        )

    @property
    def _duo(self) -> duo.Settings:
        settings = self.subject.settings
        return duo.Settings(
            sink=settings.sink,
            recent=settings.recent,
            steps=settings.steps,
            rate=settings.lr,
            penalty=settings.penalty,
            teacher_forced=settings.teacher_forced,
            seed=settings.seed,
        )

    @property
    def _how(self) -> ScoreSettings:
        settings = self.subject.settings
        lengths = settings.lengths * settings.items
        return ScoreSettings(lengths=lengths, seed=settings.seed, sink=settings.sink, recent=settings.recent)

    def record(self, name: str, values: Tensor, seconds: float) -> None:
        """Keep a score, [layers, KV heads], and the seconds that it took; what an earlier attempt spent is added."""
        self.state.setdefault("scores", {})[name] = values.tolist()
        spent = self.state.setdefault("seconds", {})
        spent[name] = round(spent.get(name, 0.0) + seconds, 2)
        self.job.folder.save()

    def _influence(self) -> Tensor:
        return self.each("influence", lambda item: influence(self.subject.model, [item], [self.rule])[..., 0])

    def _blend(self) -> Tensor:
        return mean_rank(*(self.score(name) for name in BLENDED))

    def _gauss_newton(self) -> Tensor:
        return self.each("gauss_newton", lambda item: gauss_newton(self.subject.model, item, self._duo))


def prompts(subject: Subject) -> list[Item]:
    """Prompts of the kinds and lengths that the settings ask for.

    Raises:
        InputError: a length that is too short for a prompt.
    """
    settings, tokenizer = subject.settings, subject.tokenizer
    found: list[Item] = []
    if settings.prompts != "answered":
        found += passkey_items(tokenizer, settings.lengths * settings.items, settings.seed)
    if settings.prompts != "passkey":
        documents = open_text(PYDOC).documents
        for number, length in enumerate(settings.lengths):
            draw = Random(settings.seed * 1000 + number)
            # most documents are short: others follow them, so that prompts are as long as asked for
            texts = ["\n\n".join(draw.sample(documents, len(documents))) for _ in range(settings.items)]
            found += answered_items(subject.model, tokenizer, texts, length, ANSWER, settings.seed)
    return sorted(found, key=lambda item: len(item.ids))


def _tensors(items: list[Item]) -> dict[str, Tensor]:
    """Items as tensors for a file, without their needles."""
    found: dict[str, Tensor] = {}
    for index, item in enumerate(items):
        found |= {f"{index}.ids": item.ids, f"{index}.supervised": item.supervised}
        found[f"{index}.context"] = torch.tensor([item.context, item.kind == "passkey"])
    return found


def _read(path: Path) -> list[Item]:
    """The inverse of `_tensors`."""
    kept = load_file(path)
    found = []
    for index in range(len(kept) // 3):
        context, passkey = kept[f"{index}.context"].tolist()
        kind = "passkey" if passkey else "answered"
        found.append(Item(kept[f"{index}.ids"], kept[f"{index}.supervised"], kind, context))
    return found

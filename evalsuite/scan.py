"""One pass over the windows of a text: what each costs a model, and how far the model is from another one.

Perplexity and divergence look at the same logits, so that one pass serves both. Two models are never in memory
together: the final states of the first are kept in a file, with its head, and its logits are made again from these,
some tokens at a time, while the second one runs. The same head on the same states gives the same logits, so that
nothing is approximated; a state is fifty to a hundred times smaller than the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.workers import Workers
from compress.evalsuite.head import CacheFactory, Decoder, chunk_tokens, evaluating, logits_in_chunks
from compress.evalsuite.sliding import Windows
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class WindowScore:
    """Sums over the scored tokens of one window.

    Attributes:
        nll: negative log-likelihood, in nats.
        kl: KL divergence from the other model, in nats; None where there is no other.
        agreed: tokens at which both models find the same token likeliest.
    """

    nll: float
    kl: float | None = None
    agreed: int | None = None


@dataclass
class States:
    """Final states of a model at the scored places of every window, in a file; empty until a pass has filled it.

    Attributes:
        path: the file: states ``[scored tokens, F]`` of one window after the other.
        windows: the windows.
        dtype: type of the states.
        width: F.
        head: makes logits of states.
        vocabulary: number of logits.
    """

    path: Path
    windows: Windows | None = None
    dtype: torch.dtype = torch.float32
    width: int = 0
    head: nn.Module = field(default_factory=nn.Identity)
    vocabulary: int = 0

    def fill(self, windows: Windows, decoder: Decoder, states: Iterator[Tensor]) -> None:
        """Write the states of all windows, in order."""
        with self.path.open("wb") as file:
            for part in states:
                self.dtype, self.width = part.dtype, part.shape[1]
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.windows, self.head, self.vocabulary = windows, decoder.head, decoder.vocabulary

    def of(self, index: int) -> Tensor:
        """The states of one window ``[scored tokens, F]``, read from the file."""
        assert self.windows is not None
        row = self.width * self.dtype.itemsize
        before, rows = sum(self.windows.scored[:index]), self.windows.scored[index]
        with self.path.open("rb") as file:
            file.seek(before * row)
            content = bytearray(file.read(rows * row))
        return torch.frombuffer(content, dtype=self.dtype).view(rows, self.width)


def scan(
    model: Any,
    ids: Tensor,
    windows: Windows,
    *,
    cache: CacheFactory | None = None,
    states: States | None = None,
) -> list[WindowScore]:
    """Run a model over the windows of a text, each by itself.

    Args:
        model: a transformers causal language model, on any device and in any dtype; it is left as it was.
        ids: ``[N]`` token ids of the whole text.
        windows: how it is cut.
        cache: makes the cache that each window's keys and values go through. Without one they are given at once, or,
            where ``windows.feed`` says how they go through a cache, through the one that the model makes.
        states: if empty, it is filled with this model's states; otherwise they are those of the model to compare with.
            Where one of the two has more logits, as embeddings are padded for speed, its last ones aren't compared.

    Raises:
        ValueError: the states are of other windows.
    """
    device = model.get_input_embeddings().weight.device
    with evaluating(model), Workers(None if device.type == "cpu" else 1) as workers:
        run = _Scan(model, ids, windows)
        # Caches are made here, as they are needed: the caller's factory need not be safe in several threads.
        jobs = ((index, None if cache is None else cache()) for index in range(windows.count))
        if states is None:
            return list(workers.map(lambda job: run.loss(job)[0], jobs))
        if states.windows is None:
            return _fill(states, run, workers.map(run.loss, jobs))
        if states.windows != windows:
            raise ValueError(f"the states are of {states.windows}, not of {windows}")
        return list(workers.map(lambda job: run.divergence(job, states), jobs))


def _fill(states: States, run: "_Scan", found: Iterator[tuple[WindowScore, Tensor]]) -> list[WindowScore]:
    scores = []

    def parts() -> Iterator[Tensor]:
        for score, part in found:
            scores.append(score)
            yield part

    states.fill(run.windows, run.decoder, parts())
    return scores


_Job = tuple[int, Cache | None]
"""Number of a window, and the cache that it goes through."""


class _Scan:
    """A model over a text; every method may be called in any thread."""

    def __init__(self, model: Any, ids: Tensor, windows: Windows) -> None:
        self._ids, self.windows = ids, windows
        self._device = model.get_input_embeddings().weight.device
        self.decoder = Decoder(model, ids[None, : windows.window].to(self._device))

    def loss(self, job: _Job) -> tuple[WindowScore, Tensor]:
        """The loss of a window, and its states."""
        states, targets = self._window(job)
        total, done = 0.0, 0
        tokens = chunk_tokens(self.decoder.vocabulary, copies=2)
        for logits in logits_in_chunks(self.decoder.head, states, tokens):
            total += _nll(logits.float().log_softmax(-1), targets[done : done + len(logits)])
            done += len(logits)
        return WindowScore(total), states

    def divergence(self, job: _Job, other: States) -> WindowScore:
        """The loss of a window, and its divergence from the model whose states are given."""
        states, targets = self._window(job)
        theirs = other.of(job[0]).to(self._device)
        nll, kl, agreed, done = 0.0, 0.0, 0, 0
        own, common = self.decoder.vocabulary, min(self.decoder.vocabulary, other.vocabulary)
        tokens = chunk_tokens(max(own, other.vocabulary), copies=5)
        for logits, dense in zip(
            logits_in_chunks(self.decoder.head, states, tokens),
            logits_in_chunks(other.head, theirs, tokens),
            strict=True,
        ):
            q, p = logits.float().log_softmax(-1), dense[:, :common].to(logits.device).float().log_softmax(-1)
            nll += _nll(q, targets[done : done + len(q)])
            q = q if common == own else q[:, :common].log_softmax(-1)
            kl += float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum())
            agreed += int((q.argmax(-1) == p.argmax(-1)).sum())
            done += len(q)
        return WindowScore(nll, kl, agreed)

    def _window(self, job: _Job) -> tuple[Tensor, Tensor]:
        """Final states ``[scored tokens, F]`` before each scored token of a window, and these tokens."""
        index, cache = job
        start, context = self.windows.start(index), self.windows.context(index)
        ids = self._ids[start : start + self.windows.window].to(self._device)
        feed = self.windows.feed
        sizes = [len(ids)] if feed is None else feed.sizes(len(ids))
        if cache is None and feed is None:
            states = self.decoder.states(input_ids=ids[None], use_cache=False)
        else:
            states = self.decoder.states_through_cache(ids[None], sizes, cache)
        return states[0, context - 1 : -1], ids[context:].to(states.device)


def _nll(logprobs: Tensor, targets: Tensor) -> float:
    return -float(logprobs.gather(-1, targets.to(logprobs.device)[:, None]).double().sum())

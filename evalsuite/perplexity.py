"""Perplexity in non-overlapping windows: the figure by which a compressed model is first judged.

The convention is that of Hugging Face and of the GPTQ paper: the text is tokenised once, cut into windows of equal
length without overlap, and within each window every token but the first is predicted from those before it in the
window. The loss is averaged over all predicted tokens. A figure only means something together with its window length,
so that the name carries it: ``perplexity@1024``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.errors import InputError
from compress.calibrate.workers import Workers

LOGITS_BYTES = 64 * 2**20
"""Bound on the bytes of float32 logits and log-probabilities that exist at once in a thread."""

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        name: ``perplexity@WINDOW``.
        value: exp of the mean negative log-likelihood over all predicted tokens; inf where that overflows.
        stderr: standard error of ``value`` by the delta method, taking the windows as independent draws:
            ``value * std(nll) / sqrt(windows)``. None for a single window.
        nll: mean negative log-likelihood per window, in nats per token.
        tokens: number of predicted tokens, ``windows * (window - 1)``.
    """

    name: str
    value: float
    stderr: float | None
    nll: tuple[float, ...]
    tokens: int


def perplexity(model: Any, ids: torch.Tensor, window: int = 1024, windows: int | None = None) -> Perplexity:
    """Exact perplexity over the first ``windows`` non-overlapping windows of a text.

    Args:
        model: a transformers causal language model, on any device and in any dtype.
        ids: ``[N]`` token ids of the whole text.
        window: tokens per window; the first of them is context only, ``window - 1`` are predicted.
        windows: how many windows from the start of the text; None, or more than there are, takes all whole windows.

    Raises:
        InputError: the window is shorter than 2, longer than the text or than the model's context; ``windows`` is 0.
    """
    count = _count_windows(model, ids, window, windows)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), Workers(None if device.type == "cpu" else 1) as workers:
            losses = _LossHead(model, ids[:window].to(device)[None])
            nll = list(
                workers.map(lambda i: float(losses(ids[i * window : (i + 1) * window].to(device)[None])), range(count))
            )
    finally:
        model.train(was_training)
    return _summarise(nll, window)


def _count_windows(model: Any, ids: torch.Tensor, window: int, windows: int | None) -> int:
    """Number of windows to score, after the checks that need no forward pass."""
    if window < 2:
        raise InputError("eval.window", window, "a window holds at least two tokens", allowed="2 or more")
    if windows is not None and windows < 1:
        raise InputError("eval.windows", windows, "nothing to score", allowed="1 or more")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and window > context:
        raise InputError("eval.window", window, f"longer than the model's context of {context} tokens")
    available = ids.numel() // window
    if available == 0:
        fix = "use a longer text" + (f" or a window of at most {ids.numel()}" if ids.numel() > 1 else "")
        raise InputError("eval.window", window, f"the text holds only {ids.numel()} tokens", fix=fix)
    return available if windows is None else min(windows, available)


def _summarise(nll: list[float], window: int) -> Perplexity:
    """Perplexity and its standard error from the mean loss of each window."""
    loss = torch.tensor(nll, dtype=torch.float64)
    value = math.inf if loss.mean() > 700 else float(loss.mean().exp())
    stderr = value * float(loss.std() / math.sqrt(len(nll))) if len(nll) > 1 else None
    return Perplexity(f"perplexity@{window}", value, stderr, tuple(nll), len(nll) * (window - 1))


class _LossHead:
    """Mean next-token loss of a ``[1, T]`` window, with the logits made a few tokens at a time.

    Where the language-model head on the decoder's hidden states gives the model's own logits (checked on a few tokens,
    since some families scale or cap their logits behind the head), hidden states are computed once and the head is
    applied in chunks. Otherwise the model's full logits are used.
    """

    def __init__(self, model: Any, sample: torch.Tensor) -> None:
        self.model = model
        self.decoder = model.base_model
        self.head = model.get_output_embeddings()
        vocabulary = model.get_input_embeddings().weight.shape[0]
        # A float32 copy of the logits and their log-probabilities exist together.
        self.chunk = max(1, LOGITS_BYTES // (2 * 4 * vocabulary))
        self.split = self._can_split(sample[:, :_PROBE_TOKENS])

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        start = 1
        for logits in self._logits(ids):
            targets = ids[0, start : start + logits.shape[0]].to(logits.device)
            total += F.cross_entropy(logits.float(), targets, reduction="none").double().sum().to(total.device)
            start += logits.shape[0]
        return total / (ids.shape[1] - 1)

    def _logits(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits ``[chunk, vocabulary]`` that predict the tokens from the second on."""
        if self.split:
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            for part in hidden.split(self.chunk):
                yield self.head(part)
        else:
            yield from self.model(input_ids=ids, use_cache=False).logits[0, :-1].split(self.chunk)

    def _can_split(self, ids: torch.Tensor) -> bool:
        if self.decoder is self.model or self.head is None:
            return False
        hidden = getattr(self.decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return False
        ours, own = self.head(hidden).float(), self.model(input_ids=ids, use_cache=False).logits.float()
        # Strict, because a soft cap is nearly the identity on small logits; full logits are the safe way out.
        return ours.shape == own.shape and torch.allclose(ours, own, rtol=0, atol=1e-6 * float(own.abs().max()))

"""Perplexity in windows: the figure by which a compressed model is first judged.

The convention is that of Hugging Face and of the GPTQ paper: the text is tokenised once, cut into windows of equal
length, and within each window every token but the first is predicted from those before it in the window. With a stride
shorter than the window, windows overlap and every token is scored once, with at least ``window - stride`` tokens before
it. The loss is averaged over all predicted tokens. A figure only means something together with window and stride, so
that the name carries them: ``perplexity@1024``, ``perplexity@1024/512``. A cache is measured on the tokens behind a
prompt, which the name tells too: ``perplexity@512:1024``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.scan import WindowScore, scan
from compress.evalsuite.sliding import Feed, Windows, check_windows, context_of, lay_out
from compress.evalsuite.statistics import mean_and_error


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        name: ``perplexity@WINDOW``, ``perplexity@WINDOW/STRIDE`` for windows that overlap, ``perplexity@PROMPT:WINDOW``
            where only what is behind a prompt is scored.
        value: exp of the mean negative log-likelihood over all predicted tokens; inf where that overflows.
        stderr: standard error of ``value`` by the delta method, taking the windows as independent draws:
            ``value * std(nll) / sqrt(windows)`` for windows with equally many predicted tokens. None for one window.
        nll: mean negative log-likelihood per window, in nats per token.
        tokens: number of predicted tokens.
        weights: predicted tokens per window, where windows differ in them.
    """

    name: str
    value: float
    stderr: float | None
    nll: tuple[float, ...]
    tokens: int
    weights: tuple[int, ...] | None = None


def perplexity(
    model: Any,
    ids: torch.Tensor,
    window: int = 1024,
    windows: int | None = None,
    stride: int | None = None,
    cache: CacheFactory | None = None,
) -> Perplexity:
    """Exact perplexity over the first ``windows`` windows of a text.

    Args:
        model: a transformers causal language model, on any device and in any dtype.
        ids: ``[N]`` token ids of the whole text.
        window: tokens per window; the first of them is context only.
        windows: how many windows from the start of the text; None, or more than there are, takes all whole windows.
        stride: tokens between the beginnings of two windows; None for windows without overlap.
        cache: makes the cache that each window goes through: its first half at once, without being scored, and what is
            behind it in chunks, so that what the cache keeps is what counts. By default there is none.

    Raises:
        InputError: the window is shorter than 2, longer than the text or than the model's context; the stride is longer
            than the window; ``windows`` is 0.
    """
    feed = None if cache is None else Feed.half(window)
    check_windows(window, stride, windows, context_of(model.config), feed)
    cut = lay_out(ids.numel(), window, stride, windows, feed)
    return perplexity_of(scan(model, ids, cut, cache=cache), cut)


def perplexity_of(scores: Sequence[WindowScore], windows: Windows) -> Perplexity:
    """Perplexity and its standard error from the losses of all windows."""
    nll = tuple(score.nll / count for score, count in zip(scores, windows.scored, strict=True))
    loss, error = mean_and_error(nll, windows.weights)
    value = math.inf if loss > 700 else math.exp(loss)
    return Perplexity(
        name=f"perplexity@{windows.name}",
        value=value,
        stderr=None if error is None else value * error,
        nll=nll,
        tokens=sum(windows.scored),
        weights=windows.weights,
    )

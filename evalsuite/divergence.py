"""Divergence from the dense model: how far its compressed form is from it, on the same tokens.

Perplexity can stay the same while a model gives other answers. Divergence asks how much of the dense model's
distribution is kept, token by token, and needs no right answers: mean KL divergence, the share of places at which both
models find the same token likeliest, and what becomes of whole greedy answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.evalsuite.greedy import GreedyChange, compare_answers, cut_prompts, greedy_answers
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.scan import States, WindowScore, scan
from compress.evalsuite.sliding import Windows
from compress.evalsuite.statistics import mean_and_error
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the dense one.

    Attributes:
        windows: number of windows.
        tokens: number of predicted tokens.
        mean_kl: mean of KL(dense || compressed) over these tokens, in nats per token.
        kl_stderr: its standard error, taking the windows as independent draws; None for one window.
        top1_agreement: share of tokens at which both models find the same token likeliest.
        kl: mean KL per window, in nats per token.
        greedy: what becomes of greedy answers.
        weights: predicted tokens per window, where windows differ in them.
    """

    windows: int
    tokens: int
    mean_kl: float
    kl_stderr: float | None
    top1_agreement: float
    kl: tuple[float, ...]
    greedy: GreedyChange
    weights: tuple[int, ...] | None = None

    def sentence(self) -> str:
        """The figures in words."""
        error = "" if self.kl_stderr is None else f" ± {self.kl_stderr:.2g}"
        return (
            f"Divergence from the original: KL {self.mean_kl:.4g}{error} nats a token, the same likeliest token at "
            f"{self.top1_agreement:.1%} of {self.tokens:,} places, {self.greedy.changed_answers:.0%} of "
            f"{self.greedy.prompts} greedy answers changed within {self.greedy.tokens} tokens."
        )


class Reference:
    """The dense model's side of a divergence: empty until the dense model has been scored with it.

    What is kept of the model is a file of final states (``compress.evalsuite.scan``), its head, and its greedy answers.

    Args:
        folder: an empty folder for the file; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._states = States(folder / "states")
        self._answers: Tensor | None = None

    def score(
        self, model: Any, ids: Tensor, windows: Windows, cache: CacheFactory | None = None
    ) -> tuple[list[WindowScore], Divergence | None]:
        """Score a model: the dense one at the first call, at any other one that is compared with it.

        Args:
            model: a transformers causal language model; it is left as it was.
            ids: ``[N]`` token ids of the text, the same at each call.
            windows: how it is cut, the same at each call.
            cache: makes a fresh cache for a window, or for all prompts.

        Returns:
            What :func:`compress.evalsuite.scan.scan` found, and the divergence; None for the dense model itself.
        """
        scores = scan(model, ids, windows, cache=cache, states=self._states)
        prompts, tokens = cut_prompts(ids[: windows.length], windows.window, windows.feed)
        answers = greedy_answers(model, prompts, tokens, cache)
        if self._answers is None:
            self._answers = answers
            return scores, None
        return scores, divergence_of(scores, windows, compare_answers(self._answers, answers))


def divergence_of(scores: Sequence[WindowScore], windows: Windows, greedy: GreedyChange) -> Divergence:
    """The figures from the sums of all windows."""
    scored = windows.scored
    kl = tuple((score.kl or 0.0) / count for score, count in zip(scores, scored, strict=True))
    mean, error = mean_and_error(kl, windows.weights)
    return Divergence(
        windows=windows.count,
        tokens=sum(scored),
        mean_kl=mean,
        kl_stderr=error,
        top1_agreement=sum(score.agreed or 0 for score in scores) / sum(scored),
        kl=kl,
        greedy=greedy,
        weights=windows.weights,
    )

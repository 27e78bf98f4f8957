"""How the next token is chosen: a choice that belongs to one request alone.

``generate(do_sample=True)`` draws from PyTorch's global generator, so two requests that run at the same time would
change each other's text. Here every sequence has a generator of its own: the choice is made by the last logits
processor, which leaves one token, and ``generate`` takes the likeliest.

The filters keep what transformers' warpers keep, in their order (temperature, top_k, top_p, min_p), but look at the
likeliest tokens only: sorting a vocabulary of 49,152 and drawing a number for each of its tokens took 10 ms.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

GREEDY_BELOW = 1e-5  # a temperature under which float32 logits overflow
_FIRST_LOOK = 64  # tokens among which those of top_p are looked for at first


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token every time.
        top_p: share of the probability that the likeliest tokens must hold together to be drawn from.
        top_k: how many of the likeliest tokens are drawn from; 0 is all.
        min_p: least probability of a token, as a share of the likeliest one's.
        repetition_penalty: divides positive logits of tokens that stand in prompt or answer, multiplies negative ones.
        presence_penalty: subtracted from the logit of every token that the answer holds.
        frequency_penalty: subtracted as often as the answer holds the token.
        logit_bias: token ids and what is added to their logits.
        seed: the same seed gives the same text; None draws another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def processors(self, rows: int, prompt_length: int) -> LogitsProcessorList:
        """What is done to logits [rows, vocabulary] before the likeliest token is taken.

        ``repetition_penalty`` isn't among it: that is a setting of ``generate``.
        """
        found = LogitsProcessorList()
        if self.logit_bias:
            found.append(_Bias(self.logit_bias))
        if self.presence_penalty or self.frequency_penalty:
            found.append(_Penalties(self.presence_penalty, self.frequency_penalty, prompt_length))
        if self.temperature < GREEDY_BELOW:
            return found
        found.append(_Choice(self, rows))
        return found

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn after logits [vocabulary].

        Returns:
            Their ids and their probabilities, which needn't add up to 1.
        """
        logits = logits.float() / self.temperature
        if self.top_k:
            logits, ids = logits.topk(min(self.top_k, len(logits)))
        else:
            ids = torch.arange(len(logits), device=logits.device)
        if self.top_p < 1:
            logits, found = _nucleus(logits, self.top_p)
            ids = ids[found]
        probabilities = logits.softmax(-1)
        if self.min_p:
            kept = probabilities >= self.min_p * probabilities.max()
            ids, probabilities = ids[kept], probabilities[kept]
        return ids, probabilities


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest tokens that hold ``top_p`` of the probability: their logits and where they are."""
    whole = logits.logsumexp(-1)
    look = _FIRST_LOOK
    while True:
        values, ids = logits.topk(min(look, len(logits)))
        sums = (values - whole).exp().cumsum(-1)
        if sums[-1] >= top_p or look >= len(logits):
            count = int((sums < top_p).sum()) + 1
            return values[:count], ids[:count]
        look *= 8


class _Bias(LogitsProcessor):
    """Adds a constant to the logits of single tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._ids = torch.tensor([token for token, _ in bias])
        self._values = torch.tensor([value for _, value in bias])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self._ids.to(scores.device), self._values.to(scores).expand(len(scores), -1))


class _Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which count the answer and not the prompt."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _Choice(LogitsProcessor):
    """Draws a token for every row and leaves no other; row ``i`` has the same generator however many rows there are."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        entropy = np.random.SeedSequence(None if sampling.seed is None else sampling.seed % 2**64).entropy
        self._generators = [
            np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(row,))) for row in range(rows)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = [self._draw(row, generator) for row, generator in zip(scores, self._generators, strict=True)]
        left = torch.full_like(scores, -torch.inf)
        left[torch.arange(len(chosen)), chosen] = 0
        return left

    def _draw(self, logits: Tensor, generator: np.random.Generator) -> int:
        ids, probabilities = self._sampling.candidates(logits)
        sums = probabilities.cpu().double().cumsum(-1).numpy()
        # The first token whose sum exceeds the number: never one of probability 0, not even at either end.
        number = min(generator.random() * sums[-1], np.nextafter(sums[-1], 0))
        return int(ids[np.searchsorted(sums, number, side="right")])

"""Cheap scores of KV heads: how much each looks at far tokens, without any training.

Every score is the largest of a KV head's query heads, since a cache is kept for all of them or for none, and grows with
the need for far tokens. Probabilities exist for a block of rows at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.calibrate.errors import InputError, did_you_mean
from compress.evalsuite.sliding import context_of
from compress.heads.copies import Copies
from compress.heads.data import Item, passkey_items, text_windows
from compress.heads.mean_qk import mean_qk_scores
from compress.heads.retrieval import retrieval_scores
from compress.heads.rows import measured, probabilities
from compress.tap import Seen


@dataclass(frozen=True)
class ScoreSettings:
    """On what scores are taken.

    Attributes:
        lengths: tokens of the prompts, one prompt each.
        seed: of everything random.
        haystacks: long texts; None is prose and code that come with Python.
        words: of a pass phrase at most.
        needles: pass phrases in a prompt, all of which are asked for.
        random_tokens: of the sequence for echo and induction, if the model's context holds so many.
        copies: of the same random tokens in that sequence.
        sink: first tokens that don't count as far.
        recent: newest tokens that don't.
        observed: last rows of a prompt on which distant mass is taken.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    seed: int = 0
    haystacks: tuple[str, ...] | None = None
    words: int = 8
    needles: int = 4
    random_tokens: int = 2048
    copies: int = 4
    sink: int = 4
    recent: int = 64
    observed: int = 64

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """The prompts of distant mass and retrieval."""
        return passkey_items(tokenizer, self.lengths, self.seed, self.haystacks, self.words, self.needles)


def echo_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    """Attention to earlier copies of a row's own token, on random tokens (RazorAttention, arXiv 2407.15891, 3.2).

    Returns:
        ``[layers, KV heads]``, mean mass, 0 to 1.
    """
    return _on_copies(model, tokenizer, settings, ahead=0)


def induction_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    """Attention to the tokens behind earlier copies, which is what the model has to say next (see `echo_scores`)."""
    return _on_copies(model, tokenizer, settings, ahead=1)


def distant_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    """Attention outside the first and the newest tokens, of the last rows of passkey prompts with their answers.

    Returns:
        ``[layers, KV heads]``, mean mass, 0 to 1.
    """

    def measure(seen: Seen) -> Tensor:
        length = seen.key.shape[2]
        found = torch.zeros(seen.query.shape[1], device=seen.key.device)
        for rows, mass in probabilities(seen, torch.arange(max(0, length - settings.observed), length)):
            key = torch.arange(mass.shape[2], device=mass.device)
            far = (key >= settings.sink) & (key <= rows.to(key.device)[:, None] - settings.recent)
            found += (mass * far).sum((1, 2))
        return found / min(length, settings.observed)

    return measured(model, ((item.ids, measure) for item in settings.items(tokenizer)))


def _retrieval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    return retrieval_scores(model, tokenizer, settings.items(tokenizer))


def _mean_qk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    return mean_qk_scores(model, text_windows(tokenizer, settings.lengths, settings.seed, settings.haystacks))


Score = Callable[[PreTrainedModel, PreTrainedTokenizerBase, ScoreSettings], Tensor]

SCORES: dict[str, Score] = {
    "echo": echo_scores,
    "induction": induction_scores,
    "distant": distant_scores,
    "retrieval": _retrieval,
    "mean_qk": _mean_qk,
}
NAMES = tuple(SCORES)
BLENDED = ("influence", "mean_qk")  # what the loss says of answers, and what positions alone say


def score(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> Tensor:
    """One score of every KV head.

    Args:
        name: one of ``NAMES``.
        model: a causal language model; it is left as it was.
        tokenizer: its tokenizer.
        settings: on what it is taken.

    Returns:
        ``[layers, KV heads]``, float32 on the CPU, more where far tokens matter more; 0 in layers with a sliding window
        of the model's own.

    Raises:
        InputError: an unknown score; a length that is too short for a prompt or too long for the model; for retrieval,
            a model that finds no pass phrase.
    """
    if name not in SCORES:
        raise InputError(
            "heads.score", name, "there is no such score", allowed=", ".join(NAMES), fix=did_you_mean(name, NAMES)
        )
    context = context_of(model.config.get_text_config(decoder=True))
    if context is not None and max(settings.lengths) > context:
        problem = "is longer than the model's context"
        raise InputError("heads.lengths", max(settings.lengths), problem, allowed=f"at most {context}")
    return SCORES[name](model, tokenizer, settings)


def mean_rank(*scores: Tensor) -> Tensor:
    """The mean, over scores, of a head's rank among all heads: scores of different units count alike.

    Args:
        scores: [layers, KV heads] each.

    Returns:
        The same shape, float32, above 0 to 1; heads that are alike in a score share their mean rank in it.
    """
    ranks = [rankdata(values.double().flatten().numpy()) / values.numel() for values in scores]
    return torch.tensor(sum(ranks) / len(ranks), dtype=torch.float32).view_as(scores[0])


def _on_copies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings, ahead: int
) -> Tensor:
    """Mean mass at ``ahead`` tokens behind the earlier copies of a row's token."""
    length = min(
        settings.random_tokens, context_of(model.config.get_text_config(decoder=True)) or settings.random_tokens
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    copies = Copies.of(tokenizer, vocabulary, length, settings.copies, settings.seed)
    return measured(model, iter([(copies.ids, lambda seen: copies.mass(seen, ahead))]))

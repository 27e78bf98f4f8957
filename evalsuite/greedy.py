"""Greedy answers to short prompts: what a user of a compressed model would see change."""

from dataclasses import dataclass
from typing import Any

import torch
from compress.evalsuite.head import CacheFactory, evaluating
from compress.evalsuite.sliding import Feed
from torch import Tensor

PROMPTS = 32
PROMPT_TOKENS = 32
ANSWER_TOKENS = 32
CACHE_PROMPTS = 8
"""As many, and as long as a window's prompt, where a cache is measured: of short ones it may not have dropped a bit."""

_NOTHING = -1  # behind the end of an answer; no token has this id


@dataclass(frozen=True)
class GreedyChange:
    """Greedy answers of two models to the same prompts.

    Attributes:
        prompts: number of prompts.
        tokens: tokens of an answer that doesn't end by itself.
        changed_answers: share of answers that aren't the same to the last token.
        changed_tokens: share of tokens that stand at or behind the first difference of their answer.
    """

    prompts: int
    tokens: int
    changed_answers: float
    changed_tokens: float


def cut_prompts(ids: Tensor, window: int, feed: Feed | None = None) -> tuple[Tensor, int]:
    """Prompts from all over a text, none overlapping another, and the length of the answers.

    Args:
        ids: ``[N]``, the text, at least a window long.
        window: tokens that a model is known to take; prompt and answer together are no longer.
        feed: how windows go through a cache; None where none is measured.

    Returns:
        Prompts ``[n, T]``, at most ``PROMPTS`` of ``PROMPT_TOKENS``, or ``CACHE_PROMPTS`` as long as the prompt before
        a cache; tokens to generate, at most ``ANSWER_TOKENS``.
    """
    length = min(PROMPT_TOKENS, window // 2) if feed is None else feed.prompt
    count = min(PROMPTS if feed is None else CACHE_PROMPTS, ids.numel() // length)
    step = ids.numel() // count
    prompts = torch.stack([ids[index * step : index * step + length] for index in range(count)])
    return prompts, min(ANSWER_TOKENS, window - length)


def greedy_answers(model: Any, prompts: Tensor, tokens: int, cache: CacheFactory | None = None) -> Tensor:
    """The likeliest token, again and again, for all prompts at once: they are few and short.

    No penalty, filter or temperature of the model's generation settings plays a part; its end tokens do.

    Args:
        model: a transformers causal language model; it is left as it was.
        prompts: ``[n, T]`` token ids.
        tokens: how many to generate at most.
        cache: makes a fresh cache for the batch; by default the model makes its own.

    Returns:
        ``[n, tokens]`` ids on the CPU; -1 behind an end token.
    """
    ends = torch.tensor(_end_tokens(model))
    answers = torch.full((len(prompts), tokens), _NOTHING)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    past = None if cache is None else cache()
    fed = prompts.to(model.device)
    with evaluating(model):
        for place in range(tokens):
            found = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, fed = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
            likeliest = fed[:, 0].cpu()
            answers[:, place] = likeliest.masked_fill(ended, _NOTHING)
            ended |= torch.isin(likeliest, ends)
            if ended.all():
                break
    return answers


def compare_answers(before: Tensor, after: Tensor) -> GreedyChange:
    """How much of the answers ``[n, tokens]`` of one model differs from those of another."""
    parted = (before != after).cumsum(1) > 0
    there = (before != _NOTHING) | (after != _NOTHING)
    return GreedyChange(
        prompts=len(before),
        tokens=before.shape[1],
        changed_answers=float(parted.any(1).double().mean()),
        changed_tokens=int((parted & there).sum()) / int(there.sum()),
    )


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]

"""One answer to one prompt, timed; and what its cache occupies."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from compress.evalsuite.efficiency.storage import allocated
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Pass:
    """Seconds of one answer.

    Attributes:
        first_token: from token ids on the host to the first new one on the host, the cache's making included.
        prefill: of the model's call on the prompt.
        decode: of the calls for all further tokens.
    """

    first_token: float
    prefill: float
    decode: float


def mean_pass(passes: Sequence[Pass]) -> Pass:
    """The mean of several passes."""
    return Pass(
        fmean(done.first_token for done in passes),
        fmean(done.prefill for done in passes),
        fmean(done.decode for done in passes),
    )


def random_prompt(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """Random token ids ``[1, length]`` on the CPU: as long to compute as any text."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def timed_pass(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, cache: Callable[[], Cache] | None = None
) -> Pass:
    """Answer a prompt greedily, whatever the tokens are, and time it.

    Args:
        model: a transformers causal language model, on any device.
        prompt: token ids ``[1, length]`` on the CPU.
        new_tokens: from 2; the first belongs to the prefill.
        cache: makes the cache; None lets the model make its own.
    """
    _finish(model)
    start = time.perf_counter()
    ids, held = prompt.to(model.device), None if cache is None else cache()
    called = time.perf_counter()
    output = model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
    _finish(model)
    filled = time.perf_counter()
    token = output.logits[:, -1:].argmax(-1)
    token.tolist()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    _finish(model)
    return Pass(first - start, filled - called, time.perf_counter() - first)


@torch.no_grad()
def kv_bytes(model: PreTrainedModel, prompt: Tensor, cache: Callable[[], Cache] | None = None) -> int:
    """Bytes allocated by the cache when it holds a prompt.

    All of the prompt's tokens but the last are given at once and the last by itself, as when it was generated: only
    then has a sliding layer let go of the tokens that it no longer needs.

    Args:
        model: a transformers causal language model.
        prompt: token ids ``[1, length]`` on the CPU, of at least 2 tokens.
        cache: makes the cache; None lets the model make its own.

    Returns:
        The sum of all storages: codes, scales, zero points, windows, positions; without what belongs to the model.
    """
    held: Any = None if cache is None else cache()
    for ids in (prompt[:, :-1], prompt[:, -1:]):
        held = model(ids.to(model.device), past_key_values=held, use_cache=True, logits_to_keep=1).past_key_values
    return allocated(held, besides=model).nbytes


def _finish(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

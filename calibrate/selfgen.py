"""Calibration text that the model writes itself, for a machine that has no other.

Sequences are short, many are written at once, and they are packed into windows: a short sequence costs the attention
little, and one pass over the weights serves the whole batch. Every document begins with an opening of varied kind,
since a model that starts from nothing repeats itself; an instruct model answers requests in part of the sequences.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock

import torch
from compress.calibrate.decoding import Filter, Writer, write
from compress.calibrate.openings import opening, request
from compress.calibrate.windows import SEPARATOR, CalibrationSet, calibration_set
from compress.calibrate.workers import Workers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATOR_VERSION = 1  # counts up when the same settings give other text
CACHE_BYTES = 512 << 20  # keys and values in memory at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SelfText:
    """How a model writes its own calibration text.

    Attributes:
        seed: of everything random. Equal seeds give equal text on the same machine.
        choice: which tokens may be drawn.
        chunk: tokens of a sequence; windows are packed from sequences.
        chat_share: of the sequences, that are answers to requests, if the tokenizer has a chat template.
        batch: sequences written at once by a thread, fewer where their keys and values would need more than 512 MiB.
    """

    seed: int = 0
    choice: Filter = field(default_factory=Filter)
    chunk: int = 128
    chat_share: float = 0.125
    batch: int = 64


def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    settings: SelfText,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Let a model write calibration windows.

    Args:
        model: the uncompressed model, in eval mode; its dtype decides the speed, see :func:`fast_dtype`.
        tokenizer: its tokenizer.
        samples: how many windows.
        seq_len: tokens of a window.
        settings: sampling, seed and memory.
        progress: told the tokens written and the tokens wanted, by one thread at a time.

    Returns:
        Windows ``[samples, seq_len]``. The text doesn't depend on the batch size, but for rounding.
    """
    chunk = min(settings.chunk, seq_len)
    count = math.ceil(samples * seq_len / chunk)
    uniforms = torch.rand(count, chunk, generator=torch.Generator().manual_seed(settings.seed))
    ends = frozenset(tokenizer.all_special_ids)
    writers = [Writer(openings, ends) for openings in _scripts(tokenizer, count, settings)]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    banned = torch.arange(min(len(tokenizer), vocabulary), vocabulary)
    written, lock = 0, Lock()

    def step_done(tokens: int) -> None:
        nonlocal written
        with lock:  # threads count together, and what is told never goes back
            written += tokens
            if progress is not None:
                progress(min(written, samples * seq_len), samples * seq_len)

    batch = min(settings.batch, max(1, CACHE_BYTES // _cache_bytes(model, chunk)))

    def part(i: int) -> torch.Tensor:
        return write(model, writers[i : i + batch], uniforms[i : i + batch], settings.choice, banned, step_done)

    with Workers(None if model.device.type == "cpu" else 1) as workers:
        parts = list(workers.map(part, range(0, count, batch)))
    ids = torch.cat(parts).flatten()[: samples * seq_len].view(samples, seq_len)
    return calibration_set(ids, "self", "text that the model itself wrote")


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype in which a model writes fastest: bfloat16 where the processor multiplies it natively, else float32."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else torch.float32


def _cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Keys and values of one sequence, in bytes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * length * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def _scripts(tokenizer: PreTrainedTokenizerBase, count: int, settings: SelfText) -> Iterator[Iterator[list[int]]]:
    """The openings of every sequence; requests and plain openings are spread evenly over the sequences."""
    share = settings.chat_share if tokenizer.chat_template else 0.0
    for index in range(count):
        rng = random.Random(f"{settings.seed}/{index}")
        chat = math.floor((index + 1) * share) > math.floor(index * share)
        yield _requests(tokenizer, rng) if chat else _openings(tokenizer, rng)


def _openings(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[list[int]]:
    first = _first_token(tokenizer)
    while True:
        yield first + _ids(tokenizer, SEPARATOR + opening(rng))
        first = []


def _requests(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[list[int]]:
    closing: list[int] = []
    while True:
        turn = [{"role": "user", "content": request(rng)}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        yield closing + _ids(tokenizer, str(prompt))
        closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if it does: some models write nonsense without it."""
    ids = tokenizer(SEPARATOR)["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []

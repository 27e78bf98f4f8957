"""Token windows: what the quantizer sees of a text."""

import hashlib
from dataclasses import dataclass

import torch
from compress.calibrate.errors import InputError
from compress.calibrate.text import TextSource
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
LEAST_TEXT = 4_000_000  # characters that are tokenized whole, however few windows are wanted
TEXT_PER_TOKEN = 16  # characters looked at for every token wanted, where the source has more than LEAST_TEXT
BLOCK = 2_000_000  # characters tokenized at once: a tokenizer needs some 600 bytes a token while it works
LEAST_SHARE = 0.25  # of the tokens wanted, that a text must have for its windows to overlap


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration data: windows of tokens.

    Attributes:
        ids: token ids ``[samples, seq_len]``, int64 on the CPU.
        source: the name of the source.
        origin: where the text is from, in words for a report.
        digest: sha256 of the ids and their shape.
        available: how many tokens the windows were drawn from.
        notes: what a user should know about the set, one sentence each.
    """

    ids: Tensor
    source: str
    origin: str
    digest: str
    available: int
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all windows together."""
        return self.ids.numel()


def calibration_set(
    ids: Tensor, source: str, origin: str, *, available: int | None = None, notes: tuple[str, ...] = ()
) -> CalibrationSet:
    """Put windows ``[samples, seq_len]`` and their digest together."""
    content = ids.to(torch.int64).contiguous()
    digest = hashlib.sha256(f"{tuple(content.shape)}".encode() + content.numpy().tobytes()).hexdigest()
    return CalibrationSet(content, source, origin, digest, content.numel() if available is None else available, notes)


def token_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    option: str = "calibration.source",
) -> CalibrationSet:
    """Random windows of a text.

    The documents are joined with blank lines, tokenized once without special tokens (in blocks of two million
    characters, to bound memory), and ``samples`` windows are drawn. They don't overlap where the text is long enough. A
    text with at least a quarter of the tokens wanted is used with evenly spread, overlapping windows, and a note says
    so. Of a very long source only a random part is tokenized.

    Args:
        source: the text.
        tokenizer: the model's own.
        samples: how many windows.
        seq_len: tokens of a window.
        seed: of a private random generator; equal seeds give equal windows.
        option: the option to name in errors.

    Raises:
        InputError: the text is too short; says how many tokens there are, are needed, and what would fit.
    """
    generator = torch.Generator().manual_seed(seed)
    text, notes = _bounded(source.documents, max(LEAST_TEXT, TEXT_PER_TOKEN * samples * seq_len), generator)
    tokens = _tokens(text, tokenizer)
    available, needed = tokens.numel(), samples * seq_len
    if available < max(seq_len, LEAST_SHARE * needed):
        raise _too_short(source.name, available, samples, seq_len, option)
    if available >= needed:
        starts = _apart(available, samples, seq_len, generator)
    else:
        starts = _spread(available, samples, seq_len, generator)
        notes += (f"the text has {available:,} tokens where {needed:,} are wanted, so its windows overlap",)
    ids = tokens[starts.unsqueeze(1) + torch.arange(seq_len)]
    return calibration_set(ids, source.name, source.origin, available=available, notes=notes)


def expand(ids: Tensor, factor: int) -> Tensor:
    """RSQ's dataset expansion (arXiv 2503.01820): every window ``factor`` times, rolled by ``k * seq_len / factor``.

    Important content then stands at every position. The seam where a window wraps around is kept.

    Args:
        ids: windows ``[samples, seq_len]``.
        factor: M, from 1 to ``seq_len``.

    Returns:
        ``[samples * M, seq_len]``, the M versions of a window side by side, the original first.
    """
    samples, seq_len = ids.shape
    if not 1 <= factor <= seq_len:
        raise ValueError(f"expansion factor {factor} isn't between 1 and the window length {seq_len}")
    rolled = [ids.roll(k * seq_len // factor, dims=1) for k in range(factor)]
    return torch.stack(rolled, dim=1).reshape(samples * factor, seq_len)


def _bounded(documents: list[str], limit: int, generator: torch.Generator) -> tuple[str, tuple[str, ...]]:
    """All the text if it is no longer than ``limit`` characters, else random documents, in their order."""
    total = sum(map(len, documents))
    if total <= limit:
        return SEPARATOR.join(documents), ()
    taken: dict[int, str] = {}
    left = limit
    for index in torch.randperm(len(documents), generator=generator).tolist():
        document = documents[index]
        start = int(torch.randint(max(len(document) - left, 0) + 1, (1,), generator=generator))
        taken[index] = document[start : start + left]
        left -= len(taken[index])
        if left <= 0:
            break
    note = f"a random part of {limit:,} characters of the {total:,} was tokenized"
    return SEPARATOR.join(taken[index] for index in sorted(taken)), (note,)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of a text ``[n]``; blocks end before a line break where there is one in their second half."""
    parts, start = [], 0
    while start < len(text):
        stop = start + BLOCK
        if stop < len(text):
            line_break = text.rfind("\n", start + BLOCK // 2, stop)
            stop = line_break if line_break > start else stop
        ids = tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        start = stop
    return torch.cat(parts)


def _apart(available: int, samples: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Starts of windows that don't overlap, every such set equally likely, in random order."""
    slots = torch.randperm(available - samples * (seq_len - 1), generator=generator)[:samples].sort().values
    starts = slots + torch.arange(samples) * (seq_len - 1)
    return starts[torch.randperm(samples, generator=generator)]


def _spread(available: int, samples: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Evenly spread starts of windows that overlap, in random order."""
    starts = torch.linspace(0, available - seq_len, samples, dtype=torch.float64).round().to(torch.int64)
    return starts[torch.randperm(samples, generator=generator)]


def _too_short(name: str, available: int, samples: int, seq_len: int, option: str) -> InputError:
    fits = []
    if available >= seq_len:
        fits.append(f"calibration.samples={available // seq_len} fits")
    if available // samples >= 2:
        fits.append(f"calibration.seq_len={available // samples} fits")
    return InputError(
        option,
        name,
        f"the text has {available:,} tokens, and {samples} windows of {seq_len:,} need {samples * seq_len:,}",
        fix=" or ".join(fits) + ", or give longer text" if fits else "give longer text",
    )

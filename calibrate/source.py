"""From a recipe's calibration section to token windows: what ``auto`` means, and which way the text comes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from compress.calibrate.cache import cache_key, cached
from compress.calibrate.errors import InputError
from compress.calibrate.hub import hub_problem
from compress.calibrate.selfgen import Progress, SelfText, self_generated
from compress.calibrate.text import check_text, open_text
from compress.calibrate.windows import CalibrationSet, token_windows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO, SELF = "auto", "self"
HUB_CHAT = "HuggingFaceH4/ultrachat_200k::train_sft:messages"
HUB_PLAIN = "NeelNanda/pile-10k"


@dataclass(frozen=True)
class Request:
    """The calibration section of a recipe, as far as text is concerned."""

    source: str = AUTO
    column: str = "text"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    option: str = "calibration.source"


@dataclass(frozen=True)
class Choice:
    """Which source was chosen, and why, as a sentence for log and report."""

    source: str
    reason: str


@dataclass(frozen=True)
class Model:
    """The uncompressed model, as needed to write text; opened only if text has to be written.

    Attributes:
        open: loads it, in eval mode.
        fingerprint: names its weights, e.g. the sha256 of its files.
    """

    open: Callable[[], PreTrainedModel]
    fingerprint: str


def choose_source(source: str, tokenizer: PreTrainedTokenizerBase, timeout: float = 3.0) -> Choice:
    """Resolve ``auto``: the usual Hub dataset if the Hub answers, else text that the model writes itself.

    Conversations for a tokenizer with a chat template, the Pile without one. Every other source is left as it is.
    """
    if source != AUTO:
        return Choice(source, f"calibration text: {source}, as asked")
    problem = hub_problem(timeout)
    if problem is None:
        chosen = HUB_CHAT if tokenizer.chat_template else HUB_PLAIN
        return Choice(chosen, f"calibration text: {chosen}, since the Hugging Face Hub can be reached")
    return Choice(SELF, f"calibration text: written by the model itself, since {problem}")


def check_source(request: Request) -> None:
    """Preflight: find a source that can't be read before anything heavy.

    Raises:
        InputError: see :func:`compress.calibrate.text.check_text`.
    """
    if request.source not in (AUTO, SELF):
        check_text(request.source, request.column, request.option)


def prepare(
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Get the windows that a recipe asks for.

    Args:
        request: source, shape, seed.
        tokenizer: the model's own.
        model: writes the text if the source is ``self``, or ``auto`` without a Hub.
        cache_dir: where self-written windows are kept; the user's cache folder by default.
        progress: told the tokens written and wanted, while the model writes.

    Returns:
        The windows; the first note is the reason for the source.

    Raises:
        InputError: unreadable or too short text.
    """
    choice = choose_source(request.source, tokenizer)
    if choice.source != SELF:
        try:
            return _noted(_from_text(choice.source, request, tokenizer), choice.reason)
        except InputError as error:
            if request.source != AUTO:
                raise
            choice = Choice(SELF, f"calibration text: written by the model itself, since {error}")
    settings = SelfText(seed=request.seed)
    key = cache_key(model.fingerprint, tokenizer, request.samples, request.seq_len, settings)
    made = cached(
        key,
        lambda: self_generated(model.open(), tokenizer, request.samples, request.seq_len, settings, progress),
        cache_dir,
    )
    return _noted(made, choice.reason)


def _from_text(source: str, request: Request, tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    text = open_text(source, request.column, request.option, tokenizer)
    return token_windows(text, tokenizer, request.samples, request.seq_len, request.seed, request.option)


def _noted(made: CalibrationSet, note: str) -> CalibrationSet:
    return replace(made, notes=(note, *made.notes))

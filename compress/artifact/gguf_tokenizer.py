"""A tokenizer as GGUF metadata, so that llama.cpp splits text as the original does.

llama.cpp knows two kinds that the supported families use: byte-level BPE (``gpt2``), whose way of cutting text before
the merges is one of a list of names, and SentencePiece's BPE (``llama``), which merges by scores. A tokenizer with any
other structure is refused: a model that reads other tokens than it was trained on is silently worse.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from compress.calibrate.errors import InputError
from compress.gguf_header import read_strings
from compress.gguf_reader import GgufCheckpoint
from compress.model import ModelView

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = "|".join([_ENGLISH, _WORDS, r"\p{N}{1,3}", _PUNCTUATION, _REST])
_QWEN2 = "|".join([_ENGLISH, _WORDS, r"\p{N}", _PUNCTUATION, _REST])
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _REST,
    ]
)
_GPT2, _DIGITS = "GPT-2's regular expression", "single digits"

# How text is cut, and whether a piece that is a token is taken without merging; the name is llama.cpp's.
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = MappingProxyType(
    {
        ((_GPT2,), False): "gpt-2",
        ((_DIGITS, _GPT2), False): "smollm",
        ((_QWEN2,), False): "qwen2",
        ((_LLAMA3,), True): "llama-bpe",
        ((_LLAMA3,), False): "smaug-bpe",
        ((_TEKKEN,), True): "tekken",
    }
)
_PREFIX = "tokenizer."
_MANY = 1 << 24  # no vocabulary has so many tokens


def tokenizer_metadata(view: ModelView) -> dict[str, Any]:
    """The metadata ``tokenizer.*`` of a model; that of a GGUF file is taken over as it is.

    Raises:
        InputError: llama.cpp has no tokenizer of this structure.
    """
    if isinstance(view.checkpoint, GgufCheckpoint):
        return read_strings(view.path, _PREFIX)
    return _described(view.tokenizer(), view.config.vocab_size)


def _described(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise _refusal("it has no tokenizer.json")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise _refusal(f"it is {model['type']}, not BPE")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, model, rows)
    found: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    if model.get("byte_fallback"):
        found |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        found["ggml.add_space_prefix"] = _prepends_space(backend)
    else:
        found |= {"ggml.model": "gpt2", "ggml.pre": _pre_tokenizer(backend), "ggml.merges": merges}
        found["ggml.add_space_prefix"] = False
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"ggml.{name}_token_id": getattr(tokenizer, f"{key}_token_id") for key, name in ids.items()}
    found |= {key: value for key, value in special.items() if value is not None}
    found["ggml.add_bos_token"], found["ggml.add_eos_token"] = _adds(tokenizer)
    template = tokenizer.chat_template
    if template:
        found["chat_template"] = template if isinstance(template, str) else next(iter(template.values()))
    return {_PREFIX + key: value for key, value in found.items()}


def _tokens(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, index in model["vocab"].items():
        if index < rows:
            byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
            tokens[index], types[index] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for index, added in tokenizer.added_tokens_decoder.items():
        if index < rows:
            tokens[index] = added.content
            types[index] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    if model.get("byte_fallback") and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair whose token has the highest score: minus the rank of the merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, _MANY)) for token in tokens]


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    normalizer = backend["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp's converter passes over NFC too
        raise _refusal(f"it normalizes text by {normalizer['type']}")
    steps = tuple(step for part in _sequence(backend["pre_tokenizer"], "pretokenizers") for step in _step(part))
    ignores = bool(backend["model"].get("ignore_merges"))
    if (steps, ignores) not in _PRE_TOKENIZERS:
        told = f"it cuts text by {' and '.join(steps) or 'nothing'}" + (", ignoring merges" if ignores else "")
        raise _refusal(f"{told}, which has no name there")
    return _PRE_TOKENIZERS[steps, ignores]


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _step(part: dict[str, Any]) -> list[str]:
    """One pre-tokenizer in words; an empty list for one that cuts nothing."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return [_GPT2] if regex else []
        case {"type": "Digits", "individual_digits": True}:
            return [_DIGITS]
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return [regex]
    return [json.dumps(part)]


def _prepends_space(backend: dict[str, Any]) -> bool:
    """Whether a space is put before the text; spaces must become SentencePiece's, and nothing else may change."""
    before = False
    for part in _sequence(backend["normalizer"], "normalizers") + _sequence(backend["pre_tokenizer"], "pretokenizers"):
        match part:
            case {"type": "Prepend", "prepend": "\u2581"}:
                before = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}:
                before = before or scheme != "never"
            case _:
                raise _refusal(f"it changes text by {json.dumps(part)}")
    return before


def _adds(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for before in (False, True):
        for behind in (False, True):
            if full == [tokenizer.bos_token_id] * before + plain + [tokenizer.eos_token_id] * behind:
                return before, behind
    raise _refusal("it puts other tokens than BOS and EOS around a text")


def _refusal(reason: str) -> InputError:
    problem = f"the model's tokenizer can't be described to llama.cpp: {reason}"
    return InputError("export.formats", "gguf", problem, fix="leave gguf out of export.formats")

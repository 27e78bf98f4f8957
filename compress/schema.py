"""The keys of a recipe: one frozen pydantic model a section, in the order in which the stages run.

This file is the only place where a key is described: the comments of the shipped recipes, ``compress recipes keys``,
the resolved ``recipe.yaml`` of an artifact and the "allowed" part of error messages are made from it by
``compress.keys``.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.calibrate.errors import InputError
from compress.options import (
    DEPTHS,
    EVAL_BATCH_SIZE,
    KV_CHUNK,
    LARGEST_SEED,
    LENGTHS,
    PERPLEXITY_WINDOW,
    PERPLEXITY_WINDOWS,
)

Bits = Literal[2, 3, 4, 8]
KVWidth = Literal[2, 4]


@dataclass(frozen=True)
class Allowed:
    """The values of a key in words, where its type alone doesn't say them."""

    words: str


def _listed(value: Any) -> Any:
    """Let a list be written as ``a,b`` on the command line; tuples keep a frozen model unchangeable."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    """Let a list of numbers be written as ``1,2``, or as a single number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    listed = _listed(value)
    if isinstance(value, str):
        return tuple(int(part) if part.isdecimal() else part for part in listed)
    return listed


def _pair(value: Any) -> Any:
    """Let one width stand for keys and values alike."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    return _numbers(value)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


def _group_size(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1 and value != -1:
        raise ValueError("is not a number of columns")
    return value


def _patterns(value: dict[str, int]) -> dict[str, int]:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is not a regular expression ({error})") from error
    return value


class Section(BaseModel):
    """A section: frozen, typed strictly (``"3"`` is not 3), and without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Calibration(Section):
    """The text whose layer inputs the methods look at."""

    source: str = Field(
        default="auto",
        min_length=1,
        description="Where the text comes from: auto (the Hub if it can be reached, else self), self (the model writes"
        " it), a .txt/.jsonl/.parquet file, pydoc (Python's documentation), or NAME[:CONFIG[:SPLIT[:COLUMN]]] on the"
        " Hub.",
    )
    column: str = Field(
        default="text", min_length=1, description="Column or field that holds the text, if source names none."
    )
    samples: int = Field(default=128, ge=1, description="Number of windows.")
    seq_len: int = Field(default=2048, ge=2, description="Tokens a window.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of windows, rotations, every random choice.")
    expansion: int = Field(
        default=1,
        ge=1,
        description="RSQ's dataset expansion: every window is used this often, rotated by seq_len / expansion.",
    )

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        if self.expansion > self.seq_len:
            raise InputError(
                "calibration.expansion", self.expansion, f"a window has only {self.seq_len} tokens to rotate by"
            )
        return self


class Weights(Section):
    """Weight quantization: rotation, token importance, and the solver."""

    method: Literal["rtn", "gptq"] = Field(
        default="gptq",
        description="rtn rounds to nearest and needs no text; gptq solves for the least error of the outputs.",
    )
    bits: Bits = Field(default=4, description="Bits a weight.")
    group_size: Annotated[
        int | Literal["auto"], AfterValidator(_group_size), Allowed("a positive integer, -1, auto")
    ] = Field(
        default=128,
        description="Input columns that share a scale: it must divide every layer's input size; -1 is one scale an"
        " output channel; auto takes the largest of 128, 64, 32, 16 that fits.",
    )
    symmetric: bool = Field(default=True, description="No zero points. vLLM loads 2 and 3 bits only if symmetric.")
    clip: Literal["none", "mse", "hessian"] = Field(
        default="mse",
        description="Search of each group's range: none, mse (least |error|^clip_norm), or hessian (least squared error"
        " weighted by diag(H); gptq only).",
    )
    clip_grid: int = Field(default=12, ge=1, le=1000, description="Ranges tried by the clip search.")
    clip_norm: float = Field(default=2.4, gt=0, description="Exponent of the error with clip mse.")
    act_order: bool = Field(
        default=True, description="gptq rounds columns by descending diag(H) (static act-order: free at run time)."
    )
    damp: float = Field(
        default=0.01, gt=0, description="Fraction of mean(diag H) that gptq adds to diag H; raised if too low."
    )
    sweeps: int = Field(
        default=3,
        ge=0,
        description="Rounds of coordinate descent, each with a refit of the scales, after gptq; rtn has none.",
    )
    rotation: Literal["none", "hadamard", "random"] = Field(
        default="none",
        description="Rotate the residual stream and the value heads, fused into the weights: hadamard (randomised) or"
        " random (orthogonal).",
    )
    untie: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Store a tied head apart from the embedding: auto does so if the rotation asks for it;"
        " no leaves a tied model with the per-head rotation only.",
    )
    importance: Literal[
        "none", "attention", "act_norm", "act_diff", "token_freq", "token_sim", "first_n", "first_last_n"
    ] = Field(
        default="none", description="What makes a token count more in the Hessian (RSQ); the paper chose attention."
    )
    importance_min: float = Field(
        default=0.005, ge=0, description="Weight of the least important token, before normalising."
    )
    importance_max: float = Field(
        default=1.0, gt=0, description="Weight of the most important token, before normalising."
    )
    importance_power: float = Field(
        default=1.0,
        gt=0,
        description="Exponent of the importance in the Hessian: 1 is RSQ's code, 2 is what the paper writes.",
    )
    lm_head_bits: Literal[8, 16] = Field(default=16, description="Width of the output head: 16 leaves it as it is.")
    tune_epochs: int = Field(
        default=0,
        ge=0,
        description="Passes over the text in which scales and norms, not codes, learn from the dense model's answers"
        " after all layers are solved; 0 leaves them as they are.",
    )
    tune_lr: float = Field(
        default=4e-4, gt=0, description="Learning rate of that: the relative change of a scale in one step."
    )
    tune_batch: int = Field(default=2, ge=1, description="Windows a step of that.")
    overrides: Annotated[dict[str, Bits], AfterValidator(_patterns)] = Field(
        default_factory=dict,
        description="Other bits for modules in whose name the pattern is found, as in {'down_proj$': 4}; the first"
        " match wins.",
    )

    @model_validator(mode="after")
    def _check(self) -> "Weights":
        if self.importance != "none" and self.method != "gptq":
            raise InputError(
                "weights.importance",
                self.importance,
                f"token importance enters through the Hessian, which method {self.method} doesn't use",
                fix="set weights.method=gptq or weights.importance=none",
            )
        if self.clip == "hessian" and self.method != "gptq":
            raise InputError(
                "weights.clip",
                self.clip,
                f"method {self.method} has no Hessian",
                allowed="none, mse",
                fix="set weights.clip=mse or weights.method=gptq",
            )
        if self.importance_min >= self.importance_max:
            raise InputError(
                "weights.importance_min",
                self.importance_min,
                "is not below importance_max",
                allowed=f"0 <= importance_min < {self.importance_max:g}",
            )
        return self


KVPair = Annotated[tuple[KVWidth, KVWidth], BeforeValidator(_pair), Allowed("2, 4, or a pair [keys, values] of them")]
KVPairOrNull = Annotated[
    tuple[KVWidth, KVWidth] | None, BeforeValidator(_pair), Allowed("2, 4, a pair [keys, values] of them, null")
]
Share = Annotated[float, Ge(0), Le(1)]


class KV(Section):
    """Quantization of the KV cache; its defaults are those of the recipe zipcache-plus."""

    method: Literal["zipcache"] = Field(
        default="zipcache", description="zipcache: salient tokens at high_bits, the others at low_bits."
    )
    ratio: Share = Field(
        default=0.3, description="Share of tokens that are salient, by attention score: 1 is all of them, 0 none."
    )
    high_bits: KVPair = Field(default=(4, 4), description="Bits of a salient token's keys and values.")
    low_bits: KVPair = Field(default=(2, 2), description="Bits of every other token's keys and values.")
    boundary_bits: KVPairOrNull = Field(
        default=(4, 4),
        description="Bits of all tokens in the first and last full-attention layer; null treats them as the others.",
    )
    key_scheme: Literal["channel", "token"] = Field(
        default="token",
        description="What shares a scale: channel is a channel of all keys of a class (the paper), token one token.",
    )
    center: bool = Field(default=True, description="Subtract the keys' mean from them; answers don't depend on it.")
    rotate: bool = Field(default=True, description="Rotate keys, and queries alike, by a Hadamard matrix.")
    key_cst: bool = Field(
        default=True, description="Divide key channels by the root of their maximum (channel-separable tokenwise)."
    )
    value_cst: bool = Field(default=True, description="The same for value channels.")
    clip: bool = Field(default=True, description="Search each token's range at 2 bits.")
    sinks: int = Field(default=4, ge=0, description="First tokens, which stay in 16 bits.")
    window_bits: Literal[8, 16] = Field(default=8, description="Bits of the newest tokens, which aren't packed yet.")
    window_min: int = Field(default=64, ge=0, description="Newest tokens that are never packed.")
    flush: int = Field(default=128, ge=1, description="Tokens packed at a time, once so many are beyond window_min.")
    first_flush: int = Field(
        default=256,
        ge=1,
        description="Tokens that must be there for the first packing, which fixes the channels' means and scales.",
    )
    probe_recent: Share = Field(
        default=0.01, description="Share of the queries, the newest, by whose attention tokens are found salient."
    )
    probe_random: Share = Field(default=0.09, description="Share of queries drawn at random for that.")
    probe_cap: int = Field(default=256, ge=0, description="Most queries used for that; 0 is no limit.")
    normalizer: Literal["probes", "official"] = Field(
        default="probes",
        description="What a token's attention is divided by: probes that see it, or, as the published code does,"
        " official: all queries that see it.",
    )
    budget: Annotated[float, Gt(1)] | None = Field(
        default=None,
        description="Times smaller than 16 bits that the whole cache must be at budget_tokens tokens, every byte"
        " counted: each layer's bits and ratio are then chosen by its error on the calibration text; null takes ratio,"
        " high_bits, low_bits and boundary_bits.",
    )
    budget_tokens: int = Field(default=4096, ge=1, description="Tokens at which the budget has to hold.")

    @model_validator(mode="after")
    def _check(self) -> "KV":
        if any(high < low for high, low in zip(self.high_bits, self.low_bits, strict=True)):
            raise InputError(
                "kv.high_bits",
                list(self.high_bits),
                f"gives salient tokens fewer bits than low_bits {list(self.low_bits)} gives the others",
                fix=f"set kv.low_bits={list(self.high_bits)}, or raise kv.high_bits",
            )
        if self.key_scheme == "channel" and (self.center or self.key_cst):
            named = "kv.center" if self.center else "kv.key_cst"
            raise InputError(
                named,
                True,
                "has no meaning with key_scheme channel, where every channel has its own minimum and step",
                fix="set kv.center=false and kv.key_cst=false, or kv.key_scheme=token",
            )
        if self.probe_recent + self.probe_random > 1:
            raise InputError(
                "kv.probe_random",
                self.probe_random,
                f"makes more than all queries with probe_recent {self.probe_recent:g}",
                allowed=f"0 to {1 - self.probe_recent:g}",
            )
        chosen = self.budget is not None or 0 < self.ratio < 1
        if chosen and self.probe_recent + self.probe_random == 0:
            raise InputError(
                "kv.probe_recent",
                self.probe_recent,
                "leaves no query to find salient tokens by",
                fix="set kv.probe_recent=0.05, or kv.ratio=0 or 1",
            )
        return self


class Export(Section):
    """What is written."""

    formats: Annotated[
        tuple[Literal["compressed-tensors", "gptq", "gguf"], ...], BeforeValidator(_listed), AfterValidator(_distinct)
    ] = Field(
        default=("compressed-tensors",),
        min_length=1,
        description="Checkpoint formats, all from the same codes. The first is the artifact itself, each other one a"
        " folder in it. gptq holds 4 and 8 bits, gguf 4 and 8 bits in symmetric groups of 32.",
    )
    gptq_version: Literal[1, 2] = Field(
        default=1, description="Version of the GPTQ words: 1 is read everywhere, asymmetric weights need 2."
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="Type of scales and of unquantized tensors; auto keeps the model's own, but takes float16 for gptq"
        " and gguf.",
    )
    shard_size_mb: int = Field(default=5000, ge=1, description="Largest safetensors file, in MB.")


class Eval(Section):
    """How the dense and the compressed model are scored."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=("perplexity",),
        min_length=1,
        description="perplexity, divergence (from the dense model), long-context tasks (passkey, niah_single_1, ...),"
        " and lm-eval tasks by name.",
    )
    text: str = Field(
        default="auto",
        min_length=1,
        description="Text of perplexity and divergence: auto (WikiText-2 if the Hub can be reached, else pydoc), a"
        " .txt/.jsonl/.parquet file, pydoc (Python's documentation), or NAME[:CONFIG[:SPLIT[:COLUMN]]] on the Hub.",
    )
    window: int = Field(default=PERPLEXITY_WINDOW, ge=2, description="Tokens a window of the text.")
    windows: Annotated[int, Ge(1)] | None = Field(
        default=PERPLEXITY_WINDOWS, description="Number of windows of the text; null takes all of it."
    )
    stride: Annotated[int, Ge(1)] | None = Field(
        default=None,
        description="Tokens between the beginnings of two windows: below window they overlap, and what they share is"
        " scored once; null is no overlap.",
    )
    limit: Annotated[int, Ge(1)] | None = Field(default=None, description="Items an lm-eval task; null takes all.")
    task_path: str | None = Field(default=None, description="Folder with further lm-eval task files.")
    batch_size: int = Field(default=EVAL_BATCH_SIZE, ge=1, description="Sequences a forward pass.")
    num_fewshot: Annotated[int, Ge(0)] | None = Field(
        default=None, description="Examples in an lm-eval prompt; null is the task's own number."
    )
    apply_chat_template: bool = Field(default=False, description="Ask lm-eval's questions in the chat template.")
    lengths: Annotated[tuple[Annotated[int, Ge(1)], ...], BeforeValidator(_numbers), AfterValidator(_distinct)] = Field(
        default=LENGTHS, min_length=1, description="Tokens of a long-context prompt."
    )
    depths: int = Field(default=DEPTHS, ge=1, description="Places of the needle in a long-context prompt.")
    samples: int = Field(default=1, ge=1, description="Long-context questions for each length and depth.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the long-context questions.")
    haystack: str = Field(
        default="auto",
        min_length=1,
        description="Text around the needle: repeat (RULER's sentence, again and again), or a source as for text.",
    )
    kv_prompt: Annotated[int, Ge(1)] | None = Field(
        default=None,
        description="Where perplexity and divergence measure a compressed KV cache: tokens at the beginning of a window"
        " that fill it at once and aren't scored; null is half of the window.",
    )
    kv_chunk: int = Field(
        default=KV_CHUNK,
        ge=1,
        description="Tokens that follow at once behind this prompt; 1 is token by token, as in generation.",
    )


SECTIONS: dict[str, type[Section]] = {
    "calibration": Calibration,
    "weights": Weights,
    "kv": KV,
    "export": Export,
    "eval": Eval,
}

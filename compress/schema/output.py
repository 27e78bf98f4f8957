"""The sections ``export`` and ``eval``: what is written, and how it is scored."""

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import AfterValidator, BeforeValidator, Field

from compress.options import (
    DEPTHS,
    EVAL_BATCH_SIZE,
    KV_CHUNK,
    LARGEST_SEED,
    LENGTHS,
    PERPLEXITY_WINDOW,
    PERPLEXITY_WINDOWS,
)
from compress.schema.fields import Section, distinct, listed, numbers


class Export(Section):
    """What is written."""

    formats: Annotated[
        tuple[Literal["compressed-tensors", "gptq", "gguf"], ...], BeforeValidator(listed), AfterValidator(distinct)
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

    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
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
    lengths: Annotated[tuple[Annotated[int, Ge(1)], ...], BeforeValidator(numbers), AfterValidator(distinct)] = Field(
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

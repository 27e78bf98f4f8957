"""The section ``weights``: weight quantization."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.calibrate.errors import InputError
from compress.schema.fields import Allowed, Section

Bits = Literal[2, 3, 4, 8]


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

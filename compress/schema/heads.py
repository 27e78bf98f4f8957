"""The section ``heads``: which KV heads keep every token, and what the others keep."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from compress.calibrate.errors import InputError
from compress.options import LARGEST_SEED
from compress.schema.fields import Allowed, Section, Share, distinct, numbers

BLOCK = 64  # tokens that a window is a multiple of, as in compress.plan, which takes torch along
LEAST_SINK = 4

ScoreName = Literal["blend", "influence", "gauss_newton", "echo", "induction", "distant", "retrieval", "mean_qk"]


def _blocks(value: int) -> int:
    if value % BLOCK:
        raise ValueError("is not a number of whole blocks")
    return value


class Heads(Section):
    """Streaming heads: what every KV head needs, found on the frozen model (DuoAttention, MoA, cheaper scores)."""

    method: Literal["score", "duo", "moa"] = Field(
        default="score",
        description="score ranks heads by a measurement; duo optimises a gate for every head (DuoAttention); moa gives"
        " every head a window of its own, which may grow with the text (Mixture of Attention Spans).",
    )
    score: ScoreName = Field(
        default="blend",
        description="What method score ranks by, and what decides between equal gates of method duo: blend (mean rank"
        " by influence and mean_qk), influence (change of the loss where a head becomes a streaming head), gauss_newton"
        " (curvature of duo's loss at open gates), echo or induction (attention to earlier copies of random tokens, or"
        " to what follows them), distant (attention beyond sink and recent tokens), retrieval (pass phrases that are"
        " copied), mean_qk (what positions alone say).",
    )
    retention: Annotated[float, Gt(0), Le(1)] = Field(
        default=0.5,
        description="Stored bytes of the KV cache at budget_tokens tokens, as a share of those at full attention, sinks"
        " and windows of streaming heads counted.",
    )
    budget_tokens: int = Field(default=4096, ge=1, description="Tokens at which the retention has to hold.")
    sink: int = Field(default=64, ge=LEAST_SINK, description="First tokens that a streaming head sees.")
    recent: Annotated[int, Ge(BLOCK), AfterValidator(_blocks), Allowed(f"multiples of {BLOCK}")] = Field(
        default=512, description="Newest tokens that a streaming head sees."
    )
    lengths: Annotated[tuple[Annotated[int, Ge(1)], ...], BeforeValidator(numbers), AfterValidator(distinct)] = Field(
        default=(1024, 2048), min_length=1, description="Tokens of the prompts that heads are profiled on."
    )
    prompts: Literal["passkey", "answered", "both"] = Field(
        default="both",
        description="Kind of the prompts: passkey (pass phrases hidden in text and asked for), answered (documents that"
        " the model is asked about, with its own answers), or as many of both.",
    )
    items: int = Field(default=4, ge=1, description="Prompts of each kind and length.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the prompts and of their order.")
    steps: int = Field(default=300, ge=5, description="duo: steps of the optimisation, one prompt each.")
    lr: float = Field(default=0.02, gt=0, description="duo: learning rate of the gates.")
    penalty: float = Field(
        default=0.05, gt=0, description="duo: weight of the gates' mean in the loss, where it isn't adapted."
    )
    adapt: bool = Field(
        default=True,
        description="duo: let the penalty follow from the retention, so that the gates of grouped-query models don't"
        " stay near 1; false keeps it, as published.",
    )
    teacher_forced: bool = Field(
        default=True,
        description="duo: full attention is that of the uncompressed stream, as in the published code; false takes the"
        " gated stream's own.",
    )
    rules: Literal[1, 2, 3] = Field(default=3, description="moa: different windows a layer, at most.")
    strides: Annotated[tuple[Annotated[int, Ge(2)], ...], BeforeValidator(numbers), AfterValidator(distinct)] = Field(
        default=(),
        description=f"moa: rules besides, a streaming head that keeps every so-many-th block of {BLOCK} tokens too"
        " (S2-Attention).",
    )
    elementwise: bool = Field(
        default=False,
        description="moa: sum the influence of single keys, as published, instead of that of all keys that a rule"
        " leaves out.",
    )
    forced: Share = Field(
        default=0.0, description="moa: share of the KV heads, the first by induction score, that keep every token."
    )

    @model_validator(mode="after")
    def _check(self) -> "Heads":
        if self.sink + self.recent >= self.budget_tokens and self.retention < 1:
            raise InputError(
                "heads.recent",
                self.recent,
                f"with {self.sink} sinks a streaming head keeps all of the {self.budget_tokens} tokens of"
                " budget_tokens",
                fix="lower heads.recent or heads.sink, or raise heads.budget_tokens",
            )
        return self

"""The section ``sparse``: heads that keep every token and attend some, searched for anew for every block of rows."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import AfterValidator, BeforeValidator, Field

from compress.schema.fields import Allowed, Section, Share, numbers

LEAST_LISTED = 64


def _three(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(values) != 3 or list(values) != sorted(values, reverse=True):
        raise ValueError("isn't three numbers, none larger than the one before")
    return values


class Sparse(Section):
    """Dynamic sparse attention: far tokens are searched for (HiP, and what it is compared with)."""

    method: Literal["hip", "quest", "block_mean", "sea"] = Field(
        default="hip",
        description="What finds the blocks that a block of rows attends: hip (staged pruning of chunks by a binary"
        " descent, InfiniteHiP), quest (bounds of a block's products with the mean query), block_mean (products of"
        " mean queries and mean keys), sea (an estimator of the attention matrix, fitted to the frozen model).",
    )
    k: int = Field(default=1024, ge=LEAST_LISTED, description="Tokens that are searched for.")
    sink: int = Field(default=128, ge=0, description="First tokens, which are always attended.")
    window: int = Field(default=1024, ge=64, description="Newest tokens, which are always attended.")
    dense_layers: int = Field(default=3, ge=0, description="First layers that attend every token.")
    copying_heads: Share = Field(
        default=0.1,
        description="Share of the KV heads that would search and attend every token instead: those that copy from far"
        " back, told by what they attend to in random tokens that are repeated.",
    )
    gate: Annotated[int, Ge(0)] | None = Field(
        default=None,
        description="Tokens up to which attention is dense; null: where searching begins to be faster, as the machine"
        " that runs the model measures it once.",
    )
    block_q: int = Field(default=128, ge=1, description="Rows of a prompt that share a list.")
    block_k: Literal[8, 16, 32, 64] = Field(default=8, description="Tokens of a listed block.")
    pool: int = Field(default=8, ge=1, description="hip: rows of a prompt that are averaged before they score.")
    refresh: Annotated[
        tuple[Annotated[int, Ge(1)], ...],
        BeforeValidator(numbers),
        AfterValidator(_three),
        Allowed("three integers >= 1, none larger than the one before"),
    ] = Field(
        default=(32, 16, 8),
        description="New tokens after which hip's first, second and last stage are done again; other methods take the"
        " last number.",
    )
    measure_tokens: int = Field(
        default=4096,
        ge=0,
        description="Tokens of a text on which the run measures, layer by layer, how much attention the lists see; 0"
        " leaves it out.",
    )
    sea_width: Literal[32, 64, 128, 256] = Field(
        default=128, description="sea: columns of the attention matrix that is estimated."
    )
    sea_steps: int = Field(
        default=700, ge=1, description="sea: steps of AdamW for each layer's estimator, one calibration window each."
    )
    sea_rate: Annotated[float, Gt(0)] = Field(default=2e-3, description="sea: the learning rate at its highest.")
    sea_held_out: int = Field(
        default=2,
        ge=1,
        description="sea: calibration windows that aren't learnt from; the best step is chosen by them.",
    )

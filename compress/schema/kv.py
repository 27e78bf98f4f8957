"""The section ``kv``: quantization of the KV cache."""

from typing import Annotated, Literal

from annotated_types import Gt
from pydantic import BeforeValidator, Field, model_validator

from compress.calibrate.errors import InputError
from compress.schema.fields import Allowed, Section, Share, pair

KVWidth = Literal[2, 4]
KVPair = Annotated[tuple[KVWidth, KVWidth], BeforeValidator(pair), Allowed("2, 4, or a pair [keys, values] of them")]
KVPairOrNull = Annotated[
    tuple[KVWidth, KVWidth] | None, BeforeValidator(pair), Allowed("2, 4, a pair [keys, values] of them, null")
]


class KV(Section):
    """Quantization of the KV cache; its defaults are those of the recipe zipcache-plus."""

    method: Literal["zipcache"] = Field(
        default="zipcache", description="zipcache: salient tokens at high_bits, the others at low_bits."
    )
    ratio: Share = Field(
        default=0.25, description="Share of tokens that are salient, by attention score: 1 is all of them, 0 none."
    )
    high_bits: KVPair = Field(default=(4, 4), description="Bits of a salient token's keys and values.")
    low_bits: KVPair = Field(default=(2, 2), description="Bits of every other token's keys and values.")
    boundary_bits: KVPairOrNull = Field(
        default=(4, 4),
        description="Bits of all tokens in the first and last full-attention layer; null treats them as the others.",
    )
    copying_heads: Share = Field(
        default=0.1,
        description="Share of KV heads whose tokens are all salient: those that copy from far back, told by what they"
        " attend to in random tokens that are repeated.",
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

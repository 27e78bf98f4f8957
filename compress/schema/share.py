"""The section ``share``: layers that take attention, or keys and values, from an earlier one."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MultipleOf
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from compress.calibrate.errors import InputError
from compress.schema.fields import Allowed, Section, Share

OWNERS = 2  # first layers, which an attention plan never lets share
Positive = Annotated[int, Ge(1)]
Weight = Annotated[float, Ge(0)]


def _pairs(value: Any) -> Any:
    return (
        tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value) if isinstance(value, list) else value
    )


def _unchained(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    consumers, sources = [consumer for consumer, _ in pairs], {source for _, source in pairs}
    for consumer, source in pairs:
        if source >= consumer:
            raise ValueError(f"layer {consumer} can't take from layer {source}, which isn't before it")
        if source in consumers:
            raise ValueError(f"layer {consumer} takes from layer {source}, which takes from another itself: a chain")
        if consumers.count(consumer) > 1:
            raise ValueError(f"layer {consumer} takes from two layers")
        if consumer in sources:
            raise ValueError(f"layer {consumer} takes from another and gives to another: a chain")
    return pairs


class Sharing(Section):
    """Layers that share attention (EchoAtt), or keys and values (KVSharer), and what makes up for it."""

    method: Literal["echoatt", "kvsharer"] = Field(
        default="echoatt",
        description="echoatt: a layer takes the attention probabilities of an earlier one, and has no query and key"
        " projections and caches no keys; kvsharer: it takes keys and values, and has no projections and no cache of"
        " them.",
    )
    choose: Literal["search", "blocks"] = Field(
        default="search",
        description="echoatt: search adds the layer that costs least perplexity, again and again, within budget and"
        " ratio; blocks cuts the inner layers into runs of block layers, the first of which the others take from, as"
        " published.",
    )
    pairs: Annotated[
        tuple[tuple[Annotated[int, Ge(OWNERS)], Annotated[int, Ge(0)]], ...],
        BeforeValidator(_pairs),
        AfterValidator(_unchained),
        Allowed("a list of pairs as [[12, 11], [13, 11]]"),
    ] = Field(
        default=(),
        description="Which layer takes from which, [layer, earlier layer], instead of choosing; none: they are chosen.",
    )
    ratio: Annotated[float, Gt(0), Le(1)] = Field(
        default=0.3, description="Share of the model's layers that take from others, at most."
    )
    budget: Annotated[float, Ge(0)] | None = Field(
        default=0.02,
        description="search: what perplexity may grow by at most on text that was held out, as a share of it; null:"
        " ratio alone decides.",
    )
    block: Annotated[int, Ge(2)] = Field(default=2, description="blocks: layers of a run.")
    first: Annotated[int, Ge(OWNERS)] = Field(
        default=2, description="First layers that neither take nor give; a pair of pairs may take from them."
    )
    last: Annotated[int, Ge(0)] = Field(default=2, description="Last layers, alike.")
    protect: Share = Field(
        default=0.1,
        description="Share of the KV heads, those that copy most from far back (induction heads), whose layers never"
        " take from others.",
    )
    heads: Literal["matched", "same"] = Field(
        default="matched",
        description="echoatt: matched finds for every head the earlier layer's head whose attention changes its output"
        " least; same takes that of the same number, as published.",
    )
    order: Literal["dissimilar", "similar"] = Field(
        default="dissimilar",
        description="kvsharer: which layers are tried first, those whose keys and values differ most (as published) or"
        " least.",
    )
    threshold: Annotated[float, Ge(-1), Le(1)] = Field(
        default=0.5, description="kvsharer: least cosine between the last hidden states with and without a pair."
    )
    refit: Literal["none", "output", "values"] = Field(
        default="output",
        description="What is fitted to the dense model's attention outputs, layer by layer: none, the output projection"
        " (in closed form), or the value projection too (echoatt; in turn).",
    )
    score_rank: Annotated[int, Ge(0), MultipleOf(2), Allowed("an even integer >= 0")] = Field(
        default=0,
        description="echoatt: channels of queries and keys that a layer keeps to correct the scores that it takes (a"
        " low-rank residual, in closed form), out of a head's; it caches as many channels of keys. 0: none.",
    )
    damp: Annotated[float, Gt(0)] = Field(
        default=0.01, description="Ridge of the fit, as a share of the mean square of its inputs."
    )
    search_windows: Positive = Field(
        default=16, description="search: windows of the calibration text that a trial is fitted on."
    )
    check_windows: Positive = Field(
        default=8, description="Windows of the calibration text that perplexity is measured on; they aren't fitted on."
    )
    distill: bool = Field(
        default=False, description="Train the fitted model to answer as the dense one does (EchoAtt's distillation)."
    )
    distill_minutes: Annotated[float, Gt(0)] | None = Field(
        default=10.0, description="Minutes of distillation at most; null: no limit of this kind."
    )
    distill_steps: Positive | None = Field(default=None, description="Steps of it at most; null: no such limit.")
    distill_tokens: Positive | None = Field(
        default=None, description="Tokens that are learnt from at most; null: no such limit."
    )
    distill_passes: Positive = Field(default=8, description="How often a window of the text is learnt from at most.")
    distill_length: Annotated[int, Ge(2)] = Field(default=512, description="Tokens of a window of distillation.")
    distill_batch: Positive = Field(default=4, description="Windows a step, of all processes together.")
    distill_at_once: Positive = Field(
        default=2, description="Windows in memory at once; gradients of the others of a step are accumulated."
    )
    distill_lr: Annotated[float, Gt(0)] = Field(
        default=3e-4, description="Learning rate (AdamW), after a short rise and before a cosine's fall."
    )
    distill_trained: Literal["consumers", "all"] = Field(
        default="consumers",
        description="Parameters that learn: the projections of layers that share and the norms from the first of them"
        " on, or all.",
    )
    distill_hidden: Weight = Field(default=1.0, description="Weight of the loss on hidden states.")
    distill_soft: Weight = Field(default=1.0, description="Weight of the loss on the dense model's probabilities.")
    distill_hard: Weight = Field(default=0.1, description="Weight of the loss on its most probable tokens.")
    distill_temperature: Annotated[float, Gt(0)] = Field(default=2.0, description="Temperature of its probabilities.")
    distill_next_share: Share = Field(
        default=0.0, description="Share of the budget, at its end, that learns from the text's own next tokens alone."
    )

    distill_source: str | None = Field(
        default=None,
        min_length=1,
        description="Text of the distillation: null takes that of the calibration; else a source as calibration.source"
        " has it, such as self, text that the model writes.",
    )
    distill_windows: Positive = Field(default=512, description="Windows of a source of its own.")
    distill_processes: Positive = Field(
        default=1, description="Processes that train together on this machine (torchrun); they divide each step."
    )

    @model_validator(mode="after")
    def _check(self) -> "Sharing":
        if self.method == "kvsharer" and self.refit == "values":
            problem = "layers that take keys and values have no value projection"
            raise InputError("share.refit", self.refit, problem, allowed="none, output")
        if self.score_rank and (self.method == "kvsharer" or self.refit == "none"):
            problem = "corrects scores that are taken, and is fitted before the output projection"
            raise InputError("share.score_rank", self.score_rank, problem, allowed="0 with kvsharer or refit=none")
        return self

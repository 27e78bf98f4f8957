"""AttentionPlan: what attention does at run time, for every layer and KV head; one small JSON file beside the weights.

The methods write it (``plan_writer.py``, which knows what doesn't go together), the runtime reads it, neither knows the
other. Rules belong to KV heads: a plan for each query head would need the cache of every query head.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from compress.calibrate.errors import InputError, did_you_mean
from compress.fingerprint import Fingerprint, fingerprint_of
from compress.plan_json import numbers, ranges, spread

FILE = "attention_plan.json"
VERSION = 1
BLOCK = 64  # tokens that a window is rounded up to

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class Window:
    """How far back a head sees: ``span(N) = clip(ceil64(a + b N), min, min(max, N))`` tokens, sinks not among them."""

    a: int = 0
    b: float = Field(default=1.0, ge=0, le=1)
    min: int = Field(default=0, ge=0)
    max: int | None = Field(default=None, ge=1)

    @property
    def full(self) -> bool:
        """Whether it is everything, at every length."""
        return self.b == 1 and self.a >= 0 and self.max is None

    def span(self, length: int) -> int:
        """Tokens at a length."""
        wanted = -(-int(self.a + self.b * length) // BLOCK) * BLOCK
        most = length if self.max is None else min(self.max, length)
        return min(max(wanted, min(self.min, most)), most)


@dataclass(frozen=True, config=_STRICT)
class Stride:
    """Far blocks that are seen besides the window: every ``every``-th, from block ``phase`` on."""

    every: int = Field(ge=1)
    phase: int = Field(default=0, ge=0)


@dataclass(frozen=True, config=_STRICT)
class TopK:
    """Far tokens that are searched for, ``k`` of them, by a policy; they aren't dropped, only not attended."""

    k: int = Field(ge=64)
    policy: Literal["hip", "quest", "block_mean", "sea"] = "hip"


@dataclass(frozen=True, config=_STRICT)
class Search:
    """How heads search for far tokens, for the whole cache (arXiv 2406.09827, arXiv 2502.08910).

    Attributes:
        sink: first tokens, always seen.
        window: newest tokens, always seen.
        block_q: rows of a prompt that share a list.
        block_k: tokens of a block.
        pool: rows of a prompt that hip's scores average.
        keep: most tokens that hip's second and third stage look at.
        refresh: steps of decoding after which hip's stages are done again, and the last of them for other policies.
        gate: tokens up to which attention is dense; None: as measured on the machine.
    """

    sink: int = Field(default=128, ge=0)
    window: int = Field(default=1024, ge=64)
    block_q: int = Field(default=128, ge=1)
    block_k: int = Field(default=8, ge=2)
    pool: int = Field(default=8, ge=1)
    keep: tuple[int, int] = (32768, 8192)
    refresh: tuple[int, int, int] = (32, 16, 8)
    gate: int | None = Field(default=None, ge=0)


@dataclass(frozen=True, config=_STRICT)
class KVBits:
    """Bits of (keys, values) of salient and of other tokens; ``ratio`` is the share of salient ones."""

    high: tuple[Literal[2, 4], Literal[2, 4]] = (4, 4)
    low: tuple[Literal[2, 4], Literal[2, 4]] = (2, 2)
    ratio: float = Field(default=0.3, ge=0, le=1)

    def __post_init__(self) -> None:
        if self.high == self.low and self.ratio not in (0.0, 1.0):  # nobody has to be told apart
            object.__setattr__(self, "ratio", 1.0)

    @property
    def scored(self) -> bool:
        """Whether some tokens are kept better than others."""
        return 0 < self.ratio < 1


@dataclass(frozen=True, config=_STRICT)
class Calibration:
    """Attention calibration (arXiv 2406.15765), for all query heads of the group, each with sinks of its own.

    Attributes:
        beta: what the weight of sinks is multiplied by.
        threshold: mean attention that a token has to get, from the rows that see it, to be a sink.
        relative: whether the threshold is divided by the number of tokens.
    """

    beta: float = Field(ge=0, le=1)
    threshold: float = Field(gt=0)
    relative: bool = False


@dataclass(frozen=True, config=_STRICT)
class Packing:
    """How packed heads keep their tokens, for the whole cache (arXiv 2405.14256, and what was added to it).

    Attributes:
        key_scheme: what shares a step: a channel of all keys of a class, or a token's channels.
        center: the keys' mean is subtracted, which attention doesn't see.
        rotate: keys and queries are turned by a Hadamard matrix.
        key_cst: keys are channel-separable, ``c_i = sqrt(max |K_i|)``.
        value_cst: values alike.
        clip: a search of each token's range at 2 bits.
        sinks: first tokens, kept at 16 bits.
        window_bits: of the newest tokens.
        window_min: newest tokens that are never packed.
        flush: tokens beyond them that are packed at once.
        first_flush: tokens that are there before anything is packed.
        probe_recent: share of a prompt's last rows that saliency is found by.
        probe_random: share of random rows.
        probe_cap: most rows of both kinds; 0 for any number.
        normalizer: what a token's attention is divided by: probes that see it, or all rows, as published code does.
        seed: of the random rows.
    """

    key_scheme: Literal["channel", "token"] = "token"
    center: bool = True
    rotate: bool = True
    key_cst: bool = True
    value_cst: bool = True
    clip: bool = True
    sinks: int = Field(default=4, ge=0)
    window_bits: Literal[8, 16] = 8
    window_min: int = Field(default=64, ge=0)
    flush: int = Field(default=128, ge=1)
    first_flush: int = Field(default=256, ge=1)
    probe_recent: float = Field(default=0.01, ge=0, le=1)
    probe_random: float = Field(default=0.09, ge=0, le=1)
    probe_cap: int = Field(default=256, ge=0)
    normalizer: Literal["probes", "official"] = "probes"
    seed: int = 0

    @classmethod
    def faithful(cls, seed: int = 0) -> "Packing":
        """ZipCache as published, with probes counted correctly and nothing quantized twice."""
        return cls(
            key_scheme="channel", center=False, rotate=False, key_cst=False, clip=False, sinks=0, window_bits=16,
            window_min=0, flush=100, first_flush=1, probe_recent=0.05, probe_random=0.05, probe_cap=0, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True, config=_STRICT)
class Head:
    """One KV head, and the query heads of its group.

    Attributes:
        sink: first tokens that it always sees.
        window: how far back it sees.
        stride: further blocks.
        topk: further tokens, searched for.
        summary: what stands for tokens that were dropped.
        kv: bits of its cache; None for 16.
        calibration: of its attention.
    """

    sink: int = Field(default=0, ge=0)
    window: Window = Window()
    stride: Stride | None = None
    topk: TopK | None = None
    summary: Literal["none", "mean_all", "core"] = "none"
    kv: KVBits | None = None
    calibration: Calibration | None = None

    @property
    def kind(self) -> str:
        """A word for people: full, stream, elastic, topk or stride."""
        if self.topk is not None:
            return "topk"
        if self.stride is not None:
            return "stride"
        return "full" if self.window.full else "stream" if self.window.b == 0 else "elastic"


@dataclass(frozen=True, config=_STRICT)
class Residual:
    """What a layer that takes scores adds to them: its own queries times its own keys, in a few rotary planes only.

    ``S = gain S_source + sum over planes f of scale_f <q_f, k_f>``, before the softmax; a plane are the two channels
    that rotary embedding turns together, so that positions are what they were.

    Attributes:
        planes: of every KV head, [KV heads][planes].
        gain: of what is taken, [heads].
        scale: of every plane, [heads][planes].
    """

    planes: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]
    gain: tuple[float, ...]
    scale: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        sizes = {len(own) for own in self.planes} | {len(own) for own in self.scale}
        if len(sizes) != 1 or 0 in sizes or any(len(set(own)) != len(own) for own in self.planes):
            raise ValueError("a score residual needs as many planes, and scales, of every head, none of them twice")
        if len(self.gain) != len(self.scale) or len(self.gain) % len(self.planes):
            raise ValueError("a score residual needs a gain and scales of every query head")

    @property
    def rank(self) -> int:
        """Channels of a key, which the layer caches."""
        return 2 * len(self.planes[0])


@dataclass(frozen=True, config=_STRICT)
class Share:
    """What a layer takes from an earlier one instead of making its own: a mask, keys and values, or probabilities.

    Attributes:
        mode: what is taken.
        source: the earlier layer.
        head_map: of mode ``attn``: its query head for each of the layer's; None for the same.
        residual: of mode ``attn``: what is added to its scores.
    """

    mode: Literal["mask", "kv", "attn"]
    source: int = Field(ge=0)
    head_map: tuple[int, ...] | None = None
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.residual is not None and self.mode != "attn":
            raise ValueError(f"a score residual is of mode attn, not {self.mode}")

    @property
    def rank(self) -> int:
        """Channels of the keys that the layer caches beside its values; 0 without a residual."""
        return 0 if self.residual is None else self.residual.rank

    def misfit(self, mark: Fingerprint) -> str | None:
        """What of the residual doesn't fit a model, in words."""
        own = self.residual
        if own is None:
            return None
        if (len(own.planes), len(own.gain)) != (mark.kv_heads, mark.heads):
            return f"a residual of {len(own.planes)} KV heads and {len(own.gain)} query heads"
        if any(plane >= mark.head_dim // 2 for planes in own.planes for plane in planes):
            return f"a residual in planes beyond {mark.head_dim // 2 - 1}"
        return None


@dataclass(frozen=True, config=_STRICT)
class Layer:
    """One layer: its KV heads, their order at load, and what it shares."""

    heads: tuple[Head, ...]
    perm: tuple[int, ...] | None = None
    share: Share | None = None


@dataclass(frozen=True, config=_STRICT)
class Source:
    """Who wrote, and from what."""

    method: str
    args: dict[str, Any] = field(default_factory=dict)
    dataset_hash: str | None = None
    seed: int | None = None
    tool_version: str | None = None


@dataclass(frozen=True, config=_STRICT)
class AttentionPlan:
    """See the module's text.

    Attributes:
        fingerprint: of the model.
        layers: in order.
        packing: of all packed heads; None where nothing is packed.
        search: of all heads that search; None where none does.
        writers: which method wrote which part: kv, window, stride, topk, summary, share, calibration.
        sources: the methods in the order in which they wrote.
        budget: what a method was asked to stay below, in its own words.
        scores: raw scores by method, [layers][KV heads].
        max_len_profiled: tokens of the longest text that a method looked at.
        version: of this schema.
        estimators: what the policy ``sea`` has learnt (``compress/sparse/sea_file.py``), in a file of its own beside
            this one; None until somebody reads it.
    """

    fingerprint: Fingerprint
    layers: tuple[Layer, ...]
    packing: Packing | None = None
    search: Search | None = None
    writers: dict[str, str] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    budget: dict[str, Any] | None = None
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    max_len_profiled: int | None = None
    version: int = VERSION
    estimators: Any = field(default=None, compare=False, repr=False)

    @property
    def searches(self) -> frozenset[str]:
        """The policies by which heads search."""
        return frozenset(head.topk.policy for layer in self.layers for head in layer.heads if head.topk is not None)

    @classmethod
    def empty(cls, config: Any) -> "AttentionPlan":
        """Every head sees everything at 16 bits: what the model does without a plan."""
        mark = fingerprint_of(config)
        return cls(mark, (Layer((Head(),) * mark.kv_heads),) * mark.layers)

    def check(self, config: Any) -> None:
        """Compare with a model's config.

        Raises:
            InputError: the plan is for another model; both fingerprints are told.
        """
        other = fingerprint_of(config)
        if other != self.fingerprint:
            differing = [
                f.name for f in fields(Fingerprint) if getattr(other, f.name) != getattr(self.fingerprint, f.name)
            ]
            problem = (
                f"was made for another model ({', '.join(differing)} differ): {self.fingerprint}; this one: {other}"
            )
            raise InputError(FILE, None, problem, fix="make the plan again for this model")

    def to_json(self) -> dict[str, Any]:
        """As JSON types; layers and heads that are alike are written once, defaults not at all."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layers", "estimators")}
        found: dict[str, Any] = {"version": self.version, **{k: _plain(v) for k, v in plain.items() if k != "version"}}
        found = {key: value for key, value in found.items() if value not in (None, {}, [])}
        numbered = sorted(enumerate(self.layers), key=lambda pair: json.dumps(_layer(pair[1]), sort_keys=True))
        groups = [
            {"layers": ranges(index for index, _ in own), **shape}
            for shape, own in ((_layer(same[0][1]), same) for same in _runs(numbered))
        ]
        return found | {"layers": sorted(groups, key=lambda group: numbers(group["layers"])[0])}

    def save(self, folder: Path) -> Path:
        """Write ``attention_plan.json``."""
        path = folder / FILE
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = FILE) -> "AttentionPlan":
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: a newer version, an unknown key, a value out of range, something that its own fingerprint's
                model doesn't have.
        """
        if not isinstance(content, Mapping):
            raise InputError(where, None, "isn't an attention plan: it isn't a JSON object")
        version = content.get("version")
        if version != VERSION:
            problem = f"is an attention plan of version {version!r}"
            raise InputError(where, None, problem, allowed=f"version {VERSION}", fix="update compress")
        try:
            plan = TypeAdapter(cls).validate_python({**content, "layers": spread(content["layers"])})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            known = [
                f.name for kind in (AttentionPlan, Layer, Head, Packing, Search, KVBits, Window) for f in fields(kind)
            ]
            fix = did_you_mean(str(first["loc"][-1]), known) if first["type"] == "unexpected_keyword_argument" else None
            raise InputError(where, None, f"{place}: {first['msg'].lower()}", fix=fix) from error
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise InputError(where, None, "isn't an attention plan: its layers can't be read") from error
        for fault in _faults(plan):
            raise InputError(where, None, fault, fix="make the plan again")
        return plan

    def lines(self, length: int = 4096) -> list[str]:
        """For a terminal: a letter a head (F full, S stream, E elastic, T topk, D stride), small where it is packed."""
        letters = {"full": "F", "stream": "S", "elastic": "E", "topk": "T", "stride": "D"}
        rows = []
        for same in _runs(list(enumerate(self.layers))):
            layer = same[0][1]
            marks = "".join(letters[h.kind].lower() if h.kv else letters[h.kind] for h in layer.heads)
            told = "; ".join(dict.fromkeys(_told(head) for head in layer.heads))
            shared = "" if layer.share is None else f", shares {layer.share.mode} of layer {layer.share.source}"
            rows.append(f"layers {ranges(index for index, _ in same):<12} {marks}  {told}{shared}")
        return rows


def read_plan(folder: Path) -> AttentionPlan | None:
    """The plan of an artifact, or None if it has none.

    Raises:
        InputError: it can't be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), None, "isn't JSON") from error
    return AttentionPlan.from_json(content, str(path))


def with_heads(layer: Layer, change: Mapping[int, Head]) -> Layer:
    """A layer with other heads."""
    return replace(layer, heads=tuple(change.get(index, head) for index, head in enumerate(layer.heads)))


def _told(head: Head) -> str:
    bits = head.kv
    if bits is None:
        return "16 bits" if head.calibration is None else f"16 bits, sinks x {head.calibration.beta:g}"
    high, low = ("K{}V{}".format(*pair) for pair in (bits.high, bits.low))
    return low if bits.ratio == 0 else high if bits.ratio == 1 else f"{bits.ratio:.0%} {high}, others {low}"


def _layer(layer: Layer) -> dict[str, Any]:
    """A layer as JSON types, without its number."""
    heads = [
        {"heads": ranges(index for index, _ in same), **_short(same[0][1])}
        for same in _runs(list(enumerate(layer.heads)))
    ]
    found = {k: _plain(v) for k, v in (("perm", layer.perm), ("share", layer.share)) if v is not None}
    if layer.share is not None and layer.share.residual is None:
        found["share"].pop("residual")
    return {"heads": heads} | found


def _runs(numbered: list[tuple[int, Any]]) -> list[list[tuple[int, Any]]]:
    """Neighbours that are alike."""
    return [list(own) for _, own in groupby(numbered, key=lambda pair: pair[1])]


def _short(head: Head) -> dict[str, Any]:
    return {f.name: _plain(value) for f in fields(head) if (value := getattr(head, f.name)) != getattr(Head(), f.name)}


def _plain(value: Any) -> Any:
    return TypeAdapter(type(value)).dump_python(value, mode="json") if value is not None else None


def _faults(plan: AttentionPlan) -> Iterator[str]:
    """What doesn't fit the plan's own fingerprint, or itself."""
    mark = plan.fingerprint
    if len(plan.layers) != mark.layers:
        yield f"has {len(plan.layers)} layers, and its fingerprint {mark.layers}"
    if any(not 0 <= layer < mark.layers for layer in mark.sliding):
        yield f"fingerprint.sliding names layers {list(mark.sliding)} of {mark.layers}"
    for index, layer in enumerate(plan.layers):
        if len(layer.heads) != mark.kv_heads:
            yield f"layer {index} has {len(layer.heads)} heads, and its fingerprint {mark.kv_heads} KV heads"
        if layer.perm is not None and sorted(layer.perm) != list(range(mark.kv_heads)):
            yield f"layer {index}: perm {list(layer.perm)} isn't an order of {mark.kv_heads} KV heads"
        if plan.packing is None and any(head.kv for head in layer.heads):
            yield f"layer {index}: KV bits are given, and packing isn't"
        if layer.share is not None:
            if layer.share.source >= index:
                yield f"layer {index}: share.source {layer.share.source} isn't an earlier layer"
            heads = layer.share.head_map
            if heads is not None and (len(heads) != mark.heads or any(not 0 <= n < mark.heads for n in heads)):
                yield f"layer {index}: share.head_map isn't a query head, 0 to {mark.heads - 1}, for each of them"
            if (misfit := layer.share.misfit(mark)) is not None:
                yield f"layer {index} has {misfit}"
    for name, rows in plan.scores.items():
        if len(rows) != mark.layers or any(len(row) != mark.kv_heads for row in rows):
            yield f"scores.{name} aren't a number for each of {mark.layers} layers and {mark.kv_heads} KV heads"

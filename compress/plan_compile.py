"""An attention plan at a length: small integer arrays for the runtime, and the bytes that it will take."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress.calibrate.errors import InputError
from compress.kv.bytes import KVBytes
from compress.kv.window import STEP
from compress.plan import BLOCK, FILE, AttentionPlan, Head, KVBits, Layer, Packing

MOST_CLUSTERS = 3  # rules a layer: each is one more call for every token
KernelClass = Literal["dense", "packed", "window", "mixed", "sparse", "shared"]


@dataclass(frozen=True)
class Cluster:
    """KV heads of a layer with the same rule; the heads of a cluster lie side by side."""

    heads: tuple[int, ...]
    rule: Head


@dataclass(frozen=True)
class CompiledLayer:
    """One layer at a length.

    Attributes:
        clusters: widest first.
        sink: [KV heads] int32, tokens at the beginning that each head sees.
        window: [KV heads] int32, newest tokens that it sees.
        capacity: [KV heads] int32, tokens that it keeps.
        kernel: what kind of attention the layer needs.
        nbytes: of its cache, for one sequence.
    """

    clusters: tuple[Cluster, ...]
    sink: Tensor
    window: Tensor
    capacity: Tensor
    kernel: KernelClass
    nbytes: KVBytes


@dataclass(frozen=True)
class CompiledPlan:
    """A plan at a length of ``length`` tokens; ``layers`` in order, ``nbytes`` of one sequence's whole cache."""

    length: int
    layers: tuple[CompiledLayer, ...]
    nbytes: KVBytes


def compile_plan(
    plan: AttentionPlan, length: int, policy: Literal["frozen", "grow"] = "frozen", native_window: int | None = None
) -> CompiledPlan:
    """What the runtime needs of a plan.

    Args:
        plan: checked against the model.
        length: tokens, prompt and answer together.
        policy: ``frozen`` keeps every span as it is at ``length`` from the first token on (a static ring); ``grow``
            lets it grow with the text, so that room for the largest span is needed all the same, and no token is
            dropped that a longer text would see.
        native_window: of the model's sliding layers.

    Raises:
        InputError: a layer with more different rules than the runtime keeps apart.
    """
    spans = [_spans(layer, length, policy) for layer in plan.layers]
    layers = tuple(_compile(plan, index, own, length, native_window) for index, own in enumerate(spans))
    total = sum((layer.nbytes for layer in layers), KVBytes(0, 0, 0))
    if plan.packing is not None and plan.packing.rotate and any(h.kv for layer in plan.layers for h in layer.heads):
        turn = 4 * plan.fingerprint.head_dim**2
        total += KVBytes(0, turn, turn)
    return CompiledPlan(length, layers, total)


def predict_bytes(plan: AttentionPlan, config: Any, length: int) -> KVBytes:
    """Bytes of one sequence's cache after a prompt of ``length`` tokens.

    Args:
        plan: made for the model.
        config: of the model, for the window of its sliding layers.
        length: tokens.
    """
    return _compiled(plan, config, length).nbytes


def layer_bytes(plan: AttentionPlan, config: Any, length: int) -> list[KVBytes]:
    """The same of every layer by itself, without what they share."""
    return [layer.nbytes for layer in _compiled(plan, config, length).layers]


def _compiled(plan: AttentionPlan, config: Any, length: int) -> CompiledPlan:
    window = getattr(config.get_text_config(decoder=True), "sliding_window", None)
    return compile_plan(plan, length, native_window=window)


def packed_bytes(packing: Packing, bits: KVBits, length: int, heads: int, width: int) -> KVBytes:
    """Bytes of a packed layer of one sequence after a prompt of ``length`` tokens, as ``compress.kv`` keeps it.

    Args:
        packing: how tokens are kept.
        bits: of this layer.
        length: tokens.
        heads: KV heads.
        width: dimensions of a head.
    """
    begun = length >= max(packing.first_flush, packing.window_min + 1)
    recent = min(packing.window_min, length) if begun else length
    sinks = min(packing.sinks, length - recent)
    packed = length - recent - sinks
    high = round(bits.ratio * packed)
    classes = [pair for pair, share in ((bits.high, bits.ratio), (bits.low, 1 - bits.ratio)) if share > 0]
    by_token = packing.key_scheme == "token"

    codes = (high * sum(bits.high) + (packed - high) * sum(bits.low)) * width // 8
    payload = codes + 4 * width * sinks + 2 * width * recent * packing.window_bits // 8
    stored = payload + packed * (8 if by_token else 4)
    vectors = 4 * width * packing.value_cst
    vectors += 4 * width * (len(classes) if not by_token else bool(packing.center or packing.key_cst))
    stored += vectors if packed else 0
    step = 4 if packing.window_bits == 8 else 0
    labels = -(-packed // 8) if bits.scored else 0
    stored += labels + step * recent + (4 * recent * (heads + 1) // heads if bits.scored else 0)
    room = -(-recent // STEP) * STEP - recent
    spare = room * (2 * width * packing.window_bits // 8 + step + (4 * (heads + 1) // heads if bits.scored else 0))
    spare += 4 * width * (packing.sinks - sinks)
    ledger = 8 + 12 * len(classes) + (12 if packing.sinks else 0)  # counts and bounds of a head
    allocated = stored + spare + ledger
    return KVBytes(payload * heads, stored * heads, allocated * heads + 8)


def _spans(layer: Layer, length: int, policy: str) -> list[int]:
    """Newest tokens that each head sees."""
    at = range(length, length + 1) if policy == "frozen" else range(1, length + 1, max(1, length // 64))
    return [max(head.window.span(n) for n in (*at, length)) for head in layer.heads]


def _compile(plan: AttentionPlan, index: int, spans: list[int], length: int, native: int | None) -> CompiledLayer:
    layer, mark = plan.layers[index], plan.fingerprint
    sliding = index in mark.sliding
    if sliding and native is not None:
        spans = [min(native, span) for span in spans]
    sinks = [min(head.sink, length - span) for head, span in zip(layer.heads, spans, strict=True)]
    rules: dict[tuple[Any, ...], list[int]] = {}
    for number, head in enumerate(layer.heads):
        key = (spans[number], sinks[number], replace(head, window=Head().window, sink=0))
        rules.setdefault(key, []).append(number)
    if len(rules) > MOST_CLUSTERS:
        problem = f"layer {index} has {len(rules)} different rules at {length} tokens"
        raise InputError(FILE, None, problem, allowed=f"at most {MOST_CLUSTERS} a layer")
    ordered = sorted(rules.items(), key=lambda rule: -rule[0][0])
    clusters = tuple(Cluster(tuple(heads), layer.heads[heads[0]]) for _, heads in ordered)
    capacity = [
        span + sink + _strided(head, sink, length - span)
        for head, span, sink in zip(layer.heads, spans, sinks, strict=True)
    ]
    sizes = [_cluster_bytes(plan, cluster, capacity[cluster.heads[0]], length) for cluster in clusters]
    return CompiledLayer(
        clusters,
        sink=torch.tensor(sinks, dtype=torch.int32),
        window=torch.tensor(spans, dtype=torch.int32),
        capacity=torch.tensor(capacity, dtype=torch.int32),
        kernel=_kernel(layer, sliding),
        nbytes=_shared_bytes(layer, sum(sizes, KVBytes(0, 0, 0)), plan.fingerprint.head_dim),
    )


def _shared_bytes(layer: Layer, own: KVBytes, head_dim: int) -> KVBytes:
    """What a layer keeps of keys and values: nothing where it takes both, values where it takes probabilities.

    With a score residual it keeps some channels of keys too.
    """
    if layer.share is None or layer.share.mode == "mask":
        return own
    part = head_dim + layer.share.rank if layer.share.mode == "attn" else 0
    return KVBytes(*(nbytes * part // (2 * head_dim) for nbytes in (own.payload, own.stored, own.allocated)))


def _strided(head: Head, first: int, end: int) -> int:
    """Tokens between sinks and window that a stride keeps, from ``first`` up to ``end``."""
    if head.stride is None:
        return 0
    places = torch.arange(first, max(first, end))
    return int(((places // BLOCK - head.stride.phase) % head.stride.every == 0).sum())


def _cluster_bytes(plan: AttentionPlan, cluster: Cluster, capacity: int, length: int) -> KVBytes:
    width = plan.fingerprint.head_dim
    if cluster.rule.kv is None or plan.packing is None:
        plain = 4 * width * capacity * len(cluster.heads)
        if cluster.rule.calibration is not None:
            queries = len(cluster.heads) * plan.fingerprint.heads // plan.fingerprint.kv_heads
            known = 5 * queries + 4  # what is known of a token: sums and kinds of query heads, rows that saw it
            return KVBytes(plain, plain + known * capacity, plain + known * (-(-capacity // BLOCK) * BLOCK))
        return KVBytes(plain, plain, plain)
    return packed_bytes(plan.packing, cluster.rule.kv, min(capacity, length), len(cluster.heads), width)


def _kernel(layer: Layer, sliding: bool) -> KernelClass:
    if layer.share is not None and layer.share.mode != "mask":
        return "shared"
    if any(head.topk for head in layer.heads):
        return "sparse"
    full = [head.window.full and head.stride is None for head in layer.heads]
    if sliding or not any(full):
        return "window"
    if not all(full):
        return "mixed"
    return "packed" if any(head.kv for head in layer.heads) else "dense"

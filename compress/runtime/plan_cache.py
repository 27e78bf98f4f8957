"""The one cache of every method: each layer as the attention plan has it."""

from typing import Any

from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from compress.act.part import CalibratedPart
from compress.calibrate.errors import InputError
from compress.kv.bytes import KVBytes
from compress.kv.growing import GrowingLayer
from compress.kv.layer import Cluster, PlanLayer, plain_bytes
from compress.kv.materialized import MaterializedLayer
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.part import Part
from compress.kv.plain import PlainPart, Reach
from compress.kv.rotation import Rotation
from compress.kv.searched import Lists, SearchedPart
from compress.kv.searched_packed import SearchedPackedPart
from compress.kv.taken import NothingLayer, ValuesLayer
from compress.plan import FILE, AttentionPlan, Head, Layer, Share, TopK
from compress.plan_compile import MOST_CLUSTERS
from compress.plan_order import PERMUTED, as_loaded
from compress.sparse.finder import Finder, finder
from compress.sparse.gate import Heads, gate_of
from compress.sparse.packing import unpacked
from compress.sparse.sea_file import Learned, check_learned

FULL = "full_attention"


class PlanCache(Cache):
    """A cache for ``model.generate(..., past_key_values=PlanCache(model.config, plan))``.

    The model must attend through ``compress_plan`` (``model.set_attn_implementation``) if a layer is packed or its
    heads see different tokens, and have the layers that share in its plan (``compress.share.modules.share_layers``):
    they keep values only, or nothing. Layers that aren't in the plan, and those with a sliding window or a recurrence,
    are transformers' own.

    With ``materialize`` it may keep the attention function it has (``eager``, ``sdpa``, ...): ``update`` returns all
    tokens unpacked, as tensors. Codes are those that are kept anyhow, and so is attention, to rounding, but for what
    needs the queries or the mask: salient tokens are the newest of those packed together, and padding is packed like
    tokens, hidden by the model's own mask. Each call unpacks a layer, which is slower and takes its memory for a while.

    Args:
        config: of the model.
        plan: made for this model; heads as in the checkpoint, or as they are loaded (``model.attention_plan``).
        length: tokens, prompt and answer together, that windows of elastic heads are made for; None lets them grow
            with the text.
        materialize: return tensors instead of handles, for attention functions that can't take these.

    Raises:
        InputError: a plan for another model, one that asks for what this version doesn't run, or, with
            ``materialize``, one whose heads don't attend to all tokens.
    """

    def __init__(
        self, config: PreTrainedConfig, plan: AttentionPlan, length: int | None = None, materialize: bool = False
    ) -> None:
        decoder = config.get_text_config(decoder=True)
        plan.check(decoder)
        if getattr(decoder, PERMUTED, False):
            plan = as_loaded(plan)
        self.plan, self.length, self.materialize = plan, length, materialize
        check_learned(plan)
        for index, layer in enumerate(plan.layers):
            _check(plan, index, layer)
            if materialize:
                _check_dense(index, layer)
        packed = any(head.kv for layer in plan.layers for head in layer.heads)
        turned = packed and plan.packing is not None and plan.packing.rotate
        self.rotation = Rotation(plan.fingerprint.head_dim) if turned else None
        self._lists = {
            (layer.share.source, rule): Lists()
            for layer in plan.layers
            if layer.share is not None and layer.share.mode == "mask"
            for rule in _rules(layer)
        }
        kinds, arguments = get_layer_types_and_kwargs(decoder)
        layers = [self._layer(index, kind, own) for index, (kind, own) in enumerate(zip(kinds, arguments, strict=True))]
        super().__init__(layers=layers)

    def _layer(self, index: int, kind: str, arguments: dict[str, Any]) -> Any:
        if kind != FULL:
            return DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
        own = self.plan.layers[index]
        rules = _rules(own)
        if own.share is not None and own.share.mode != "mask":
            return ValuesLayer(index, own.share.rank) if own.share.mode == "attn" else NothingLayer(index)
        if list(rules) == [Head()]:
            return GrowingLayer()
        clusters = [
            Cluster(None if len(rules) == 1 else heads, self._part(index, rule)) for rule, heads in rules.items()
        ]
        return MaterializedLayer(index, clusters) if self.materialize else PlanLayer(index, clusters)

    def _part(self, index: int, rule: Head) -> Part:
        if rule.topk is not None and rule.kv is None:
            share = self.plan.layers[index].share
            taken = None if share is None else self._lists[share.source, rule]
            return SearchedPart(self._finder(index, rule.topk, taken is None), self._lists.get((index, rule)), taken)
        if rule.calibration is not None:
            return CalibratedPart(rule.calibration)
        if rule.kv is None:
            return PlainPart(Reach(rule.sink, rule.window, rule.stride, self.length))
        assert self.plan.packing is not None
        packed = PackedFormat(self.plan.packing, rule.kv, index, self.rotation, blind=self.materialize)
        if rule.topk is None:
            return PackedPart(packed)
        assert self.plan.search is not None
        return SearchedPackedPart(packed, self._finder(index, rule.topk, True), self.plan.search.sink)

    def _finder(self, index: int, topk: TopK, searches: bool) -> Finder:
        """Of a layer; one that takes another's lists doesn't search itself."""
        assert self.plan.search is not None
        mark, search = self.plan.fingerprint, self.plan.search
        learned: Learned | None = self.plan.estimators if topk.policy == "sea" else None
        shape = None if learned is None else learned.header.shape
        gate = gate_of(topk, search, Heads(mark.heads, mark.kv_heads, mark.head_dim), shape=shape)
        return finder(topk, search, gate, None if learned is None or not searches else learned.estimator(index))

    def nbytes(self) -> KVBytes:
        """Bytes of all layers and of what they share; what isn't packed is payload."""
        turn = 0 if self.rotation is None else self.rotation.nbytes
        return sum((self._layer_bytes(layer) for layer in self.layers), KVBytes(0, turn, turn))

    def _layer_bytes(self, layer: Any) -> KVBytes:
        return layer.nbytes() if isinstance(layer, PlanLayer) else plain_bytes(layer)


def _rules(layer: Layer) -> dict[Head, tuple[int, ...]]:
    """KV heads by what they are told, those that see everything first."""
    found: dict[Head, list[int]] = {}
    for number, head in enumerate(layer.heads):
        found.setdefault(head, []).append(number)
    ordered = sorted(found.items(), key=lambda rule: (not rule[0].window.full, rule[1]))
    return {head: tuple(heads) for head, heads in ordered}


def _check_dense(index: int, layer: Layer) -> None:
    """Raise for heads whose attention isn't that of all tokens, and for layers that share."""
    if layer.share is not None:
        problem = f"layer {index} shares with layer {layer.share.source}, which only 'compress_plan' attends"
        raise InputError(FILE, None, problem, fix="leave materialize out")
    heads = [
        number
        for number, head in enumerate(layer.heads)
        if not head.window.full or head.topk or head.stride or head.calibration
    ]
    if heads:
        first = layer.heads[heads[0]]
        does = "searches for far tokens" if first.topk else "sees a window"
        does = "re-weights its sinks" if first.calibration else does
        raise InputError(
            FILE,
            None,
            f"layer {index}: KV head {heads[0]} {does}, which materialize=True can't tell the model's attention",
            allowed="heads that see everything, packed or not",
            fix="leave materialize out, and model.set_attn_implementation('compress_plan')",
        )


def _check(plan: AttentionPlan, index: int, layer: Layer) -> None:
    """Raise for what this cache doesn't do."""
    if layer.share is not None:
        _check_share(plan, index, layer.share)
    if any(head.summary != "none" for head in layer.heads):
        problem = (
            f"layer {index}: 'summary', written by {plan.writers.get('summary', 'nobody')}, isn't run by this cache"
        )
        raise InputError(FILE, None, problem, fix="make the plan without it")
    if any(head.calibration and head != Head(calibration=head.calibration) for head in layer.heads):
        problem = f"layer {index}: a KV head whose attention is calibrated packs, drops or searches for tokens too"
        raise InputError(FILE, None, problem, allowed="calibrated heads see everything at 16 bits")
    if any(head.kv and not (head.window.full and head.stride is None) for head in layer.heads):
        problem = f"layer {index}: a KV head drops tokens and packs them too"
        raise InputError(FILE, None, problem, allowed="packed heads see everything, heads with a window keep 16 bits")
    if any(head.kv for head in layer.heads) and plan.packing is None:
        raise InputError(FILE, None, f"layer {index}: KV bits are given, and not how tokens are packed")
    searching = [head for head in layer.heads if head.topk is not None]
    if any(not head.window.full or head.stride is not None for head in searching):
        problem = f"layer {index}: a KV head that searches for far tokens drops some too"
        raise InputError(FILE, None, problem, allowed="a head that searches keeps all tokens")
    if searching and plan.search is None:
        raise InputError(FILE, None, f"layer {index}: far tokens are to be searched for, and not how")
    if any(head.kv is not None for head in searching):
        _check_packed_search(plan, index, layer)
    if len(_rules(layer)) > MOST_CLUSTERS:
        problem = f"layer {index} has {len(_rules(layer))} different rules"
        raise InputError(FILE, None, problem, allowed=f"at most {MOST_CLUSTERS} a layer")


def _check_packed_search(plan: AttentionPlan, index: int, layer: Layer) -> None:
    """Raise for packed keys that can't be searched among."""
    search, packing = plan.search, plan.packing
    assert search is not None
    assert packing is not None
    if "sea" in plan.searches:
        problem = f"layer {index}: attention is estimated from all keys, and keys are packed"
        raise InputError(FILE, None, problem, allowed="the policies hip, quest and block_mean")
    if layer.share is not None or any(other.share and other.share.source == index for other in plan.layers):
        problem = f"layer {index} shares its lists, and searches among packed keys"
        raise InputError(FILE, None, problem, allowed="layers that share lists keep 16 bits")
    apart = unpacked(packing)
    if search.sink < packing.sinks or search.window < apart:
        problem = (
            f"heads that search among packed keys attend {search.sink} first and {search.window} newest tokens, and "
            f"{packing.sinks} and up to {apart} aren't packed"
        )
        raise InputError(FILE, None, problem, allowed=f"sink from {packing.sinks}, window from {apart}")


def _check_share(plan: AttentionPlan, index: int, share: Share) -> None:
    """Raise for layers that can't share."""
    pair = (plan.layers[index], plan.layers[share.source])
    if index in plan.fingerprint.sliding or share.source in plan.fingerprint.sliding:
        problem = f"layer {index} shares with layer {share.source}, and one of them has a sliding window"
        raise InputError(FILE, None, problem, allowed="layers of full attention")
    if pair[1].share is not None:
        raise InputError(FILE, None, f"layer {index} shares with layer {share.source}, which shares itself: a chain")
    if share.mode == "mask":
        if pair[0].heads != pair[1].heads and any(head.topk for layer in pair for head in layer.heads):
            problem = f"layer {index} takes the lists of layer {share.source}, and doesn't search as that one does"
            raise InputError(FILE, None, problem, allowed="layers whose KV heads search alike")
    elif any(head != Head() for layer in pair for head in layer.heads):
        problem = f"layers {index} and {share.source} share attention, and one of them packs, searches or drops tokens"
        raise InputError(FILE, None, problem, allowed="layers that share see everything at 16 bits")

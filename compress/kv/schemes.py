"""Ways to keep a KV cache, by name: ours, and those that it is measured against."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from compress.calibrate.errors import InputError, did_you_mean
from compress.fingerprint import kv_shape, sliding_layers
from compress.kv.copying import Place, anywhere, how_many
from compress.kv.kivi import GROUP, KiviCache, KiviFormat
from compress.kv.settings import bits_of, copying_bits, packing_of
from compress.plan import AttentionPlan, Source
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.runtime.plan_cache import PlanCache
from compress.schema import KV

Make = Callable[[int], Cache]
"""Makes an empty cache that keeps so many more recent tokens of every head in 16 bits (8 in a window of 8 bits)."""

DENSE = "dense"
_PLAIN = {
    "boundary_bits": None, "copying_heads": 0.0, "key_scheme": "token", "center": False, "rotate": False,
    "key_cst": False, "value_cst": False, "clip": False, "sinks": 0, "window_bits": 16, "window_min": 0,
    "flush": GROUP, "first_flush": 1,
}  # fmt: skip
_KIVI_RESIDUAL = 128
_HQQ_AXIS = 1  # transformers' default, 0, isn't one that HQQ groups numbers of a token by


@dataclass(frozen=True)
class Scheme:
    """A way to keep a cache.

    Attributes:
        name: what tables call it.
        about: what it is, in a few words.
        make: makes an empty cache; None where it can't be made here.
        grows: whether ``make`` heeds how many more tokens are to be kept in 16 bits.
        missing: why it can't be made.
    """

    name: str
    about: str
    make: Make | None
    grows: bool = True
    missing: str = ""


def plan_of(
    config: PreTrainedConfig, settings: KV, seed: int = 0, copying: Sequence[Place] | None = None
) -> AttentionPlan:
    """The plan that a recipe's section ``kv`` without a budget describes, for any model.

    Args:
        config: of the model.
        settings: the section.
        seed: of probes.
        copying: its heads that copy; None takes as many, whichever, which is enough to count bytes.
    """
    decoder = config.get_text_config(decoder=True)
    sliding = sliding_layers(decoder)
    packed = [index for index in range(decoder.num_hidden_layers) if index not in sliding]
    writer = PlanWriter(AttentionPlan.empty(config), Source(settings.method))
    writer.packing(packing_of(settings, seed))
    for layer, held in bits_of(settings, packed).items():
        writer.kv(layer, held)
    if copying is None:
        heads, _ = kv_shape(config)
        copying = anywhere(how_many(settings.copying_heads, heads * len(packed)), heads, packed)
    for layer, head in copying:
        writer.kv(layer, copying_bits(settings), (head,))
    return writer.finish()


def from_settings(
    name: str,
    about: str,
    config: PreTrainedConfig,
    settings: KV,
    seed: int = 0,
    copying: Sequence[Place] | None = None,
) -> Scheme:
    """A scheme of our own cache, as :func:`plan_of` makes its plan; more recent tokens widen its window."""
    told = copying if copying is None or settings.copying_heads else ()

    def make(more: int) -> Cache:
        wider = settings.model_copy(update={"window_min": settings.window_min + more})
        return PlanCache(config, plan_of(config, wider, seed, told))

    return Scheme(name, about, make)


def from_plan(name: str, config: PreTrainedConfig, plan: AttentionPlan) -> Scheme:
    """A scheme that is what a plan says."""
    return Scheme(name, "its own plan", lambda _: PlanCache(config, plan), grows=False)


def from_recipe(name: str, config: PreTrainedConfig, seed: int = 0, copying: Sequence[Place] | None = None) -> Scheme:
    """The section ``kv`` of a recipe; see :func:`from_settings`.

    Raises:
        InputError: no such recipe, or one without a fixed ``kv``.
    """
    settings = Recipe.load(name).kv
    if settings is None or settings.budget is not None:
        problem = "has no section kv" if settings is None else "chooses bits under a budget, in a run"
        raise InputError("--kv", name, problem, fix="use zipcache-plus, zipcache, or an artifact's attention_plan.json")
    return from_settings(name, _OURS.get(name, "a recipe"), config, settings, seed, copying)


_OURS = {
    "zipcache-plus": "4 bits for salient tokens, 2 for others; int8 window, rotation, clipping",
    "zipcache": "the paper: 60 % at 4 bits, keys by channel",
}
_UNIFORM: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform-4": ("4 bits for every token, plain rounding", {"ratio": 1.0, "high_bits": (4, 4), "low_bits": (4, 4)}),
    "uniform-2": ("2 bits for every token, plain rounding", {"ratio": 0.0, "high_bits": (2, 2), "low_bits": (2, 2)}),
    "k4v2": ("4-bit keys, 2-bit values, plain rounding", {"ratio": 1.0, "high_bits": (4, 2), "low_bits": (4, 2)}),
}


def schemes(config: PreTrainedConfig, seed: int = 0, copying: Sequence[Place] | None = None) -> dict[str, Scheme]:
    """All that are known, by name, in the order of a table.

    Args:
        config: of the model.
        seed: of probes.
        copying: heads that copy, for our own; None takes any, which is enough to count bytes.
    """
    found = [Scheme(DENSE, "transformers' own, 16 bits", lambda _: DynamicCache(config=config), grows=False)]
    found += [from_recipe(name, config, seed, copying) for name in _OURS]
    found += [_kivi(config, bits) for bits in (2, 4)]
    for name, (about, changes) in _UNIFORM.items():
        found.append(from_settings(name, about, config, KV(**_PLAIN | changes), seed))
    plus = Recipe.load("zipcache-plus").kv
    assert plus is not None
    all_alike = {"ratio": 1.0, "high_bits": (4, 2), "low_bits": (4, 2), "boundary_bits": None, "copying_heads": 0.0}
    about = "4-bit keys, 2-bit values, and all else of zipcache-plus"
    found.append(from_settings("k4v2-plus", about, config, plus.model_copy(update=all_alike), seed))
    found += [_transformers(config, backend, bits) for backend in ("quanto", "hqq") for bits in (2, 4)]
    return {scheme.name: scheme for scheme in found}


def named(
    names: list[str], config: PreTrainedConfig, seed: int = 0, copying: Sequence[Place] | None = None
) -> list[Scheme]:
    """Some of :func:`schemes`.

    Raises:
        InputError: an unknown name.
    """
    known = schemes(config, seed, copying)
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise InputError("--methods", name, "is not a scheme", allowed=", ".join(known), fix=near)
    return [known[name] for name in names]


def _kivi(config: PreTrainedConfig, bits: int) -> Scheme:
    """KIVI; where it has to agree in bytes its residual is the shortest, and more recent tokens are beside it."""

    def make(more: int) -> Cache:
        if more == 0:
            return KiviCache(config, KiviFormat(bits, _KIVI_RESIDUAL))
        keys = more // GROUP * GROUP  # keys come in groups; in between, values take their share
        return KiviCache(config, KiviFormat(bits, GROUP, (keys, keys + 2 * (more - keys))))

    return Scheme(f"kivi-{bits}", f"KIVI: {bits} bits in groups of 32, a residual of 16 bits", make)


def _transformers(config: PreTrainedConfig, backend: str, bits: int) -> Scheme:
    name = f"{backend}-{bits}"
    about = f"transformers' QuantizedCache, {bits} bits in groups of 64"
    there = is_optimum_quanto_available() if backend == "quanto" else is_hqq_available()
    if not there:
        package = "optimum-quanto" if backend == "quanto" else "hqq"
        return Scheme(name, about, None, missing=f"{package} isn't installed")
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if set(kinds) != {"full_attention"}:
        return Scheme(name, about, None, missing="transformers' QuantizedCache takes no model with sliding layers")
    axes = {"axis_key": _HQQ_AXIS, "axis_value": _HQQ_AXIS} if backend == "hqq" else {}

    def make(more: int) -> Cache:
        return QuantizedCache(backend=backend, config=copy.copy(config), nbits=bits, **axes)

    return Scheme(name, about, make, grows=False)
